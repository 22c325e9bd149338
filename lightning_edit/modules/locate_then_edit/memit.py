# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""MEMIT: mass-editing memory in a transformer."""

# Shapes: E requests, D hidden, M inputs of the edited projection, N keys with those of earlier
# edits.

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.locator import ModelTree
from lightning_edit.functional.least_squares import key_strengths, preserving_update
from lightning_edit.modules.locate_then_edit.base import LocateModule
from lightning_edit.modules.locate_then_edit.earlier_edits import EarlierEdits
from lightning_edit.modules.locate_then_edit.moment_weight import check_weight, moment_ridge
from lightning_edit.modules.locate_then_edit.spread import Spread, lower_layers

__all__ = ["MEMIT"]


class MEMIT(LocateModule):
    """Mass-editing memory in a transformer: many pairs at once, by ridge regression, over layers.

    Target values are residual streams after the last edited layer. From below, each layer takes
    an equal part of what is still lacking there, ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹, with K the keys of the
    batch, R what the layer adds at them and C the second moment of keys.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. When None, five up to a quarter
            of the depth.
        moment_weight: λ, how many keys the second moment counts for; 15 000 in the papers for
            GPT-J, which does not carry over to other models. When None, it is chosen in each layer
            so that the median request of the first batch gets ``written_share``.
        written_share: Share q / (q + λ), q = kᵀ C⁻¹ k, of its pair that a request would get alone.
        aligned: Take keys and target values of every batch from the unedited model, each layer
            adding an equal part, and keep the keys of earlier batches. Batches written one after
            another then give the change of their union at once (arXiv 2605.26670).
        steps: Passes of the optimization of a target value, at most.
        clamp_norm_factor: A target value differs from v by at most this factor times ‖v‖.
        kwargs: Arguments of every locate-then-edit method, such as ``context_templates``, and of
            every editor; see ``LocateModule``.

    Raises:
        ValueError: If λ is negative or the share is not between 0 and 1.

    References:
        Mass-Editing Memory in a Transformer, arXiv 2210.07229, sections 4.2 and 4.3.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2210.07229"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")
    groups_contexts: ClassVar[bool] = True

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        moment_weight: float | None = None,
        written_share: float = 0.9,
        aligned: bool = False,
        steps: int = 25,
        clamp_norm_factor: float = 0.75,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, steps=steps, clamp_norm_factor=clamp_norm_factor, **kwargs)
        check_weight(moment_weight, written_share)
        self.settings = replace(self.settings, place="block")
        self.moment_weight = moment_weight
        self.written_share = written_share
        self.aligned = aligned

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        return lower_layers(tree)

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        spread = Spread(self, batch, aligned=self.aligned)  # searches the target values
        memories: dict[int, EarlierEdits] = {}
        for pairs in spread:  # of each layer, from below
            factor = self.factor(pairs.layer)  # C = L Lᵀ
            strength = key_strengths(pairs.keys.T, factor)  # q = kᵀ C⁻¹ k, [E]
            ridge = moment_ridge(  # λ
                self.moment_weight, self.written_share, strength, pairs.earlier.ridge
            )
            residuals = pairs.lacking / pairs.layers - pairs.written  # Rᵀ, [E, D]
            # ΔW = R Kᵀ (λ C + A Aᵀ)⁻¹ = u vᵀ
            u, v = preserving_update(pairs.all_keys, residuals.T, factor, ridge, pairs.earlier.gram)
            spread.write(pairs, residuals, u, v, strength / (strength + ridge))
            kept = pairs.earlier.with_keys(pairs.keys) if self.aligned else EarlierEdits()
            chosen = ridge if self.moment_weight is None else None
            memories[pairs.layer] = replace(kept, ridge=chosen)
        return spread.edit(memories)
