# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a network is trained for: how answers count, and how what has to stay counts."""

# Shapes: N tokens, V vocabulary.

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

__all__ = ["Objective", "WeightedSum"]


class Objective(ABC):
    """What a network is trained for. Weights may depend on the network, which is handed in."""

    @abstractmethod
    def token_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each token of the new answers, [N], from logits [N, V] and tokens [N]."""

    @abstractmethod
    def weights(self, network: nn.Module) -> tuple[float, float]:
        """Weights of the loss of the new answers, and of that of all that has to stay."""

    @abstractmethod
    def added(self, network: nn.Module, edit: Tensor, kept: Tensor) -> Tensor | None:
        """A further term with the network's own parameters, given both losses; None for none."""


class WeightedSum(Objective):
    """a · NLL + b · what has to stay.

    Args:
        edit: a.
        kept: b.

    Examples:
        >>> WeightedSum(0.1, 1.0).weights(nn.Identity())
        (0.1, 1.0)
    """

    def __init__(self, edit: float, kept: float) -> None:
        self._weights = edit, kept

    @override
    def token_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets, reduction="none")

    @override
    def weights(self, network: nn.Module) -> tuple[float, float]:
        return self._weights

    @override
    def added(self, network: nn.Module, edit: Tensor, kept: Tensor) -> None:
        """Nothing: both losses are in the sum already."""
