# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""EMMET: equality-constrained mass model editing."""

# Shapes: E requests, D hidden, M inputs of the edited projection, N keys with those of earlier
# edits.

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.functional.least_squares import factorize, key_strengths, preserving_update
from lightning_edit.modules.locate_then_edit.base import LocateModule
from lightning_edit.modules.locate_then_edit.earlier_edits import EarlierEdits
from lightning_edit.modules.locate_then_edit.spread import Spread

__all__ = ["EMMET"]


class EMMET(LocateModule):
    """Equality-constrained mass editing: ROME for a batch, all pairs stored exactly.

    ΔW = R (Kᵀ C′⁻¹ K + ε I)⁻¹ Kᵀ C′⁻¹ with C′ = w C + η I. At ε = 0 every pair is stored as it is
    asked for; otherwise, with η = 0, it is MEMIT with λ = ε w.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. A sixth of the way up if None.
        softness: ε, the ridge of the pairs' system; 0 is the equality constraint.
        moment_weight: w, factor of the second moment.
        norm_weight: η, weight of ‖ΔW‖² beside the second moment.
        aligned: Take keys and target values of every batch from the unedited model, each layer
            adding an equal part, and keep the keys of earlier batches. Batches written one after
            another then give the change of their union at once (arXiv 2605.26670).
        steps: Passes of the optimization of a target value, at most.
        clamp_norm_factor: A target value differs from v by at most this factor times ‖v‖.
        kwargs: Arguments of every locate-then-edit method, such as ``context_templates``, and of
            every editor; see ``LocateModule``.

    Raises:
        ValueError: If a weight is negative, or the second moment's is 0.

    References:
        A Unified Framework for Model Editing, arXiv 2403.14236, section 3.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.14236"
    groups_contexts: ClassVar[bool] = True

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        softness: float = 0.0,
        moment_weight: float = 1.0,
        norm_weight: float = 0.0,
        aligned: bool = False,
        steps: int = 25,
        clamp_norm_factor: float = 0.75,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, steps=steps, clamp_norm_factor=clamp_norm_factor, **kwargs)
        if softness < 0 or norm_weight < 0 or moment_weight <= 0:
            raise ValueError(
                "`softness` and `norm_weight` are expected to be at least 0 and `moment_weight` "
                f"above 0, but got {softness}, {norm_weight} and {moment_weight}."
            )
        self.settings = replace(self.settings, place="block")
        self.softness = softness
        self.moment_weight = moment_weight
        self.norm_weight = norm_weight
        self.aligned = aligned

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        spread = Spread(self, batch, aligned=self.aligned)  # searches the target values
        memories: dict[int, EarlierEdits] = {}
        ridge = self.softness  # ε
        for pairs in spread:  # of each layer, from below
            factor = self.from_second_moment(  # C′ = L Lᵀ
                pairs.layer, _weighted_factor, self.moment_weight, self.norm_weight
            )
            strength = key_strengths(pairs.keys.T, factor)  # q = kᵀ C′⁻¹ k, [E]
            residuals = pairs.lacking / pairs.layers - pairs.written  # Rᵀ, [E, D]
            # ΔW = R (Aᵀ C′⁻¹ A + ε I)⁻¹ Aᵀ C′⁻¹ = u vᵀ
            u, v = preserving_update(pairs.all_keys, residuals.T, factor, ridge, pairs.earlier.gram)
            spread.write(pairs, residuals, u, v, strength / (strength + ridge))
            if self.aligned:
                memories[pairs.layer] = pairs.earlier.with_keys(pairs.keys)
        return spread.edit(memories)


def _weighted_factor(second_moment: Tensor, moment_weight: float, norm_weight: float) -> Tensor:
    """Cholesky factor of C′ = w C + η I, float64, of the shape of C."""
    weighted = moment_weight * second_moment.double()
    weighted.diagonal(dim1=-2, dim2=-1).add_(norm_weight)
    return factorize(weighted)
