# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""EMMET: equality-constrained mass model editing."""

# Shapes: E requests, D hidden, M inputs of the edited projection.

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_edit.core.change import LowRank
from lightning_edit.core.locator import ModelTree, WeightSite
from lightning_edit.functional.least_squares import factorize, key_strengths, preserving_update
from lightning_edit.modules.locate_then_edit.mass_edit import MassEditModule

__all__ = ["EMMET"]


class EMMET(MassEditModule):
    """Equality-constrained mass editing: ROME for a batch, all pairs stored exactly.

    ΔW = R (Kᵀ C′⁻¹ K + ε I)⁻¹ Kᵀ C′⁻¹ with C′ = w C + η I. At ε = 0 every pair is stored as it is
    asked for; otherwise, with η = 0, it is MEMIT with λ = ε w.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. A sixth of the way up if None.
        softness: ε, the ridge of the pairs' system; 0 is the equality constraint.
        moment_weight: w, factor of the second moment.
        norm_weight: η, weight of ‖ΔW‖² beside the second moment.
        kwargs: Arguments of every mass editor, of every locate-then-edit method, and of every
            editor; see ``MassEditModule``.

    Raises:
        ValueError: If a weight is negative, or the second moment's is 0.

    References:
        A Unified Framework for Model Editing, arXiv 2403.14236, section 3.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.14236"

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        softness: float = 0.0,
        moment_weight: float = 1.0,
        norm_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        if softness < 0 or norm_weight < 0 or moment_weight <= 0:
            raise ValueError(
                "`softness` and `norm_weight` are expected to be at least 0 and `moment_weight` "
                f"above 0, but got {softness}, {norm_weight} and {moment_weight}."
            )
        self.softness = softness
        self.moment_weight = moment_weight
        self.norm_weight = norm_weight

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        return [int(len(tree.blocks) / 6 + 0.5)]

    @override
    def factor(self, layer: int) -> Tensor:
        if layer not in self._factors:
            moment = self.moment_weight * self.second_moment(layer).double()
            moment.diagonal().add_(self.norm_weight)
            self._factors[layer] = factorize(moment)
        return self._factors[layer].to(self.model.device)

    @override
    def solve(
        self, site: WeightSite, keys: Tensor, residuals: Tensor
    ) -> tuple[LowRank, dict[str, Tensor]]:
        factor = self.factor(site.layer)
        strength = key_strengths(keys.T, factor)
        old, gram = self.remembered(site.layer)
        u, v = preserving_update(
            torch.cat([old, keys.T], 1), residuals.T, factor, self.softness, gram
        )
        return LowRank(u, v), {"written_share": strength / (strength + self.softness)}
