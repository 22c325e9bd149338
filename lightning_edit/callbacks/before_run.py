# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The model as it was before a run, which a resumed run has to know, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from lightning_edit.forgetting.base_weights import BaseWeights

__all__ = ["BeforeRun"]


class BeforeRun:
    """What a callback keeps of the model before its run, in memory and in each full checkpoint.

    Args:
        name: What a checkpoint holds it under, that of the callback.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        #: The weights; None where nothing is kept.
        self.weights: BaseWeights | None = None
        self._loaded: dict[str, Tensor] | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether a checkpoint has told how the model was, and ``begin`` will take it over."""
        return self._loaded is not None

    def begin(self, model: nn.Module) -> None:
        """Keeps the model as a checkpoint has it, or as it is now.

        Raises:
            ModelError: If nothing in it is trainable, or more than plain LoRA factors.
            ArtifactError: If the checkpoint is of another model.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            self.weights = BaseWeights.of(model)
        else:
            self.weights = BaseWeights.from_whole(model, loaded)

    def forget(self) -> None:
        """Keeps nothing."""
        self.weights = self._loaded = None

    def save(self, model: Callable[[], nn.Module], checkpoint: dict[str, object]) -> None:
        """Writes into a checkpoint what is kept; every process must call this."""
        if self.weights is not None:
            checkpoint[self.name] = {"base": self.weights.whole(model())}

    def load(self, checkpoint: dict[str, object]) -> None:
        """Takes over what a checkpoint has, for ``begin``."""
        held = cast("dict[str, dict[str, Tensor]]", checkpoint.get(self.name, {}))
        self._loaded = held.get("base")
