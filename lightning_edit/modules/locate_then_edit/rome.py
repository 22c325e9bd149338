# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""ROME: rank-one model editing."""

# Shapes: E requests, T templates, D hidden, M inputs of the edited projection.

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.locator import ModelTree
from lightning_edit.functional.rank_one import rank_one_update, whiten
from lightning_edit.modules.locate_then_edit.base import LocateModule
from lightning_edit.modules.locate_then_edit.rank_one import RankOneChanges, only_site

__all__ = ["ROME"]


class ROME(LocateModule):
    """Rank-one model editing: stores one key-value pair in one MLP, smallest change first.

    With k the key of the subject, averaged over context templates, v* the target value and C the
    second moment of keys, each request adds ΔW = (v* − W k₀) uᵀ / (u · k₀), u = C⁻¹ k, where k₀ is
    the key in the bare prompt. Target values of a batch are optimized together; the rank-one
    updates follow one another.

    References:
        Locating and Editing Factual Associations in GPT, arXiv 2202.05262, section 3.1.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2202.05262"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")

    @override
    def edited_names(self, tree: ModelTree) -> list[str]:
        return [only_site(self.sites(tree), type(self).__name__).name]

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        [site] = self.sites(self.tree)
        batch, found, failed = self.find_target_values(batch, site.layer)
        factor = self.factor(site.layer)  # C = L Lᵀ
        changes = RankOneChanges(site, self.session.device)
        found_keys = site.kept(found.keys)
        directions = whiten(self.mean_keys(found_keys), factor)  # u = C⁻¹ k of each, [E, M]
        for e, request in enumerate(batch.requests):
            direction, key = directions[e], found_keys[e, 0]  # k₀, that of the bare prompt
            # v* − W k₀, where later requests see what earlier ones of the batch wrote.
            residual = found.deltas[e] - changes.at(key)
            u, v, _ = rank_one_update(residual, direction, key)  # ΔW = (v* − W k₀) uᵀ / (u · k₀)
            changes.add(request, u, v, key)
        return changes.edit(batch.requests, found, failed)
