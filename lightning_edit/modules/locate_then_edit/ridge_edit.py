# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What MEMIT and PMET share: pairs are weighed against the second moment, by ridge regression."""

# Shapes: E requests, D hidden, M inputs of the edited projection.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.change import LowRank
from lightning_edit.core.locator import WeightSite
from lightning_edit.functional.least_squares import key_strengths, preserving_update
from lightning_edit.modules.locate_then_edit.mass_edit import MassEditModule

__all__ = ["RidgeEditModule"]


class RidgeEditModule(MassEditModule):
    """Base of editors that weigh the pairs of a batch against what the second moment stands for.

    With K the keys of a batch, R what the layer lacks at them and C the second moment of keys, a
    layer changes by ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. When None, five up to a quarter
            of the depth.
        moment_weight: λ, how many keys the second moment counts for; 15 000 in the papers for
            GPT-J, which does not carry over to other models. When None, it is chosen in each layer
            so that the median request of the first batch gets ``written_share``.
        written_share: Share q / (q + λ), q = kᵀ C⁻¹ k, of its pair that a request would get alone.
        kwargs: Arguments of every mass editor, of every locate-then-edit method, and of every
            editor; see ``MassEditModule``.

    Raises:
        ValueError: If λ is negative or the share is not between 0 and 1.

    References:
        Mass-Editing Memory in a Transformer, arXiv 2210.07229, section 4.2.
    """

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        moment_weight: float | None = None,
        written_share: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        if moment_weight is not None and moment_weight < 0:
            raise ValueError(
                f"`moment_weight` is expected to be at least 0, but got {moment_weight}."
            )
        if not 0 < written_share < 1:
            raise ValueError(
                f"`written_share` is expected to be between 0 and 1, but got {written_share}."
            )
        self.moment_weight = moment_weight
        self.written_share = written_share

    @override
    def solve(
        self, site: WeightSite, keys: Tensor, residuals: Tensor
    ) -> tuple[LowRank, dict[str, Tensor]]:
        factor = self.factor(site.layer)
        strength = key_strengths(keys.T, factor)
        weight = self._weight(site.layer, strength)
        old, gram = self.remembered(site.layer)
        u, v = preserving_update(torch.cat([old, keys.T], 1), residuals.T, factor, weight, gram)
        return LowRank(u, v), {"written_share": strength / (strength + weight)}

    def _weight(self, layer: int, strength: Tensor) -> float:
        if self.moment_weight is not None:
            return self.moment_weight
        kept = self.carried.get(f"weight/{layer}")
        if kept is not None:
            return float(kept)
        return float(strength.median()) * (1 - self.written_share) / self.written_share

    @override
    def carry(self, batch: EditBatch, keys: dict[int, Tensor]) -> dict[str, Tensor]:
        carried = super().carry(batch, keys)
        if self.moment_weight is None:
            for layer, key in keys.items():
                name = f"weight/{layer}"
                if name in self.carried:
                    carried[name] = self.carried[name]
                else:
                    weight = self._weight(layer, key_strengths(key.T, self.factor(layer)))
                    carried[name] = torch.tensor(weight, dtype=torch.float64)
        return carried
