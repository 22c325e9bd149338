# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""AlphaEdit: edits in the null space of what the model knows."""

# Shapes: E requests, D hidden, M inputs of the edited projection, P protected directions.

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.locator import ModelTree
from lightning_edit.functional.least_squares import outside, projected_update
from lightning_edit.modules.locate_then_edit.base import LocateModule
from lightning_edit.modules.locate_then_edit.spread import Spread, lower_layers

__all__ = ["AlphaEdit"]


class AlphaEdit(LocateModule):
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
        aligned: Take keys and target values of every batch from the unedited model, each layer
            adding an equal part, and carry its keys as they are there. Batches written one after
            another then give the change of their union at once (arXiv 2605.26670).
        steps: Passes of the optimization of a target value, at most.
        clamp_norm_factor: A target value differs from v by at most this factor times ‖v‖.
        kwargs: Arguments of every locate-then-edit method, such as ``context_templates``, and of
            every editor; see ``LocateModule``.

    Raises:
        ValueError: If λ is not above 0 or the share is not between 0 and 1.

    References:
        AlphaEdit: Null-Space Constrained Knowledge Editing, arXiv 2410.02355, section 3.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.02355"
    groups_contexts: ClassVar[bool] = True

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        ridge_weight: float = 1.0,
        nullspace_threshold: float | None = None,
        protected_share: float = 0.7,
        aligned: bool = False,
        steps: int = 25,
        clamp_norm_factor: float = 0.75,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, steps=steps, clamp_norm_factor=clamp_norm_factor, **kwargs)
        if ridge_weight <= 0:
            raise ValueError(f"`ridge_weight` is expected to be above 0, but got {ridge_weight}.")
        if not 0 < protected_share < 1:
            raise ValueError(
                f"`protected_share` is expected to be between 0 and 1, but got {protected_share}."
            )
        self.settings = replace(self.settings, place="block")
        self.ridge_weight = ridge_weight
        self.nullspace_threshold = nullspace_threshold
        self.protected_share = protected_share
        self.aligned = aligned

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        return lower_layers(tree)

    def protected(self, layer: int) -> tuple[Tensor, float]:
        """Protected directions of a layer, [M, P] or of each expert, and the gap after them."""
        return self.from_second_moment(
            layer, self.moments.protected, self.nullspace_threshold, self.protected_share
        )

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        spread = Spread(self, batch, aligned=self.aligned)  # searches the target values
        ridge = self.ridge_weight  # λ
        for pairs in spread:  # of each layer, from below
            directions, _ = self.protected(pairs.layer)  # Q, with P = I − Q Qᵀ
            residuals = pairs.lacking / pairs.layers - pairs.written  # Rᵀ, [E, D]
            # ΔW = R Kᵀ P (P A Aᵀ P + λ I)⁻¹ = u vᵀ
            u, v = projected_update(
                pairs.all_keys, residuals.T, directions, ridge, pairs.earlier.gram
            )
            # What is left of a key outside of the protected directions decides how much is written.
            strength = outside(pairs.keys.T, directions).square().sum(0)
            spread.write(pairs, residuals, u, v, strength / (strength + ridge))
        # The paper takes the keys again from the edited model.
        keys = spread.keys if self.aligned else self.layer_keys(spread.batch)
        return spread.edit(
            {layer: self.remembered(layer).with_keys(new) for layer, new in keys.items()}
        )
