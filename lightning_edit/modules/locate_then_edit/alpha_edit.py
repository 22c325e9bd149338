# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""AlphaEdit: edits in the null space of what the model knows."""

# Shapes: E requests, D hidden, M inputs of the edited projection, P protected directions.

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.change import LowRank
from lightning_edit.core.locator import WeightSite
from lightning_edit.functional.least_squares import projected_update, protected_directions
from lightning_edit.modules.locate_then_edit.mass_edit import MassEditModule

__all__ = ["AlphaEdit"]


class AlphaEdit(MassEditModule):
    """Null-space constrained editing: writes only where keys of other facts do not lie.

    With P the projection on the directions in which the second moment is small, and A the keys of
    this batch and of all before it, ΔW = R Kᵀ P (P A Aᵀ P + λ I)⁻¹. Keys of earlier edits are
    carried from edit to edit.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. When None, five up to a quarter
            of the depth.
        ridge_weight: λ; 10 in the paper.
        nullspace_threshold: Eigenvalues of the second moment from which directions are protected;
            0.02 in the paper, for models of another scale. By ``protected_share`` when None.
        protected_share: Share of the second moment's trace that the protected directions hold.
        kwargs: Arguments of every mass editor, of every locate-then-edit method, and of every
            editor; see ``MassEditModule``.

    Raises:
        ValueError: If λ is not above 0 or the share is not between 0 and 1.

    References:
        AlphaEdit: Null-Space Constrained Knowledge Editing, arXiv 2410.02355, section 3.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.02355"

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        ridge_weight: float = 1.0,
        nullspace_threshold: float | None = None,
        protected_share: float = 0.7,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        if ridge_weight <= 0:
            raise ValueError(f"`ridge_weight` is expected to be above 0, but got {ridge_weight}.")
        if not 0 < protected_share < 1:
            raise ValueError(
                f"`protected_share` is expected to be between 0 and 1, but got {protected_share}."
            )
        self.ridge_weight = ridge_weight
        self.nullspace_threshold = nullspace_threshold
        self.protected_share = protected_share
        self._protected: dict[int, tuple[Tensor, float]] = {}

    def protected(self, layer: int) -> tuple[Tensor, float]:
        """Protected directions of a layer, [M, P], and the gap behind the last of them."""
        if layer not in self._protected:
            self._protected[layer] = protected_directions(
                self.second_moment(layer), self.nullspace_threshold, self.protected_share
            )
        directions, gap = self._protected[layer]
        return directions.to(self.model.device), gap

    @override
    def solve(
        self, site: WeightSite, keys: Tensor, residuals: Tensor
    ) -> tuple[LowRank, dict[str, Tensor]]:
        directions, _ = self.protected(site.layer)
        old, gram = self.remembered(site.layer)
        u, v = projected_update(
            torch.cat([old, keys.T], 1), residuals.T, directions, self.ridge_weight, gram
        )
        # What is left of a key outside of the protected directions decides how much is written.
        strength = keys.square().sum(1) - (keys @ directions).square().sum(1)
        return LowRank(u, v), {"written_share": strength / (strength + self.ridge_weight)}

    @override
    def carry(self, batch: EditBatch, keys: dict[int, Tensor]) -> dict[str, Tensor]:
        # The paper takes the keys again from the edited model.
        return self.remember(keys if self.aligned else self.layer_keys(batch))
