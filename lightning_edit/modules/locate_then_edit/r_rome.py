# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""R-ROME: ROME without its collapse."""

# Shapes: E requests, T templates, D hidden, M inputs of the edited projection.

from __future__ import annotations

from typing import Any, ClassVar, Literal

from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.locator import ModelTree
from lightning_edit.functional.rank_one import rank_one_update, whiten
from lightning_edit.modules.locate_then_edit.base import LocateModule
from lightning_edit.modules.locate_then_edit.rank_one import RankOneChanges, only_site

__all__ = ["RROME"]

KeyKind = Literal["averaged", "prompt"]


class RROME(LocateModule):
    """ROME with one and the same key throughout, which keeps its divisor from vanishing.

    ROME takes the direction from averaged keys and divides by its product with the bare prompt's
    key; where the two differ much, the update explodes. Here both are k:
    ΔW = (v* − W k) uᵀ / (u · k), u = C⁻¹ k, so that the divisor kᵀ C⁻¹ k is always positive.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: The layer to edit; negative ones count from the end. A sixth of the way up if None.
        key: k is ``averaged`` over context templates, or that of the bare ``prompt``.
        kwargs: Arguments of every locate-then-edit method, such as ``context_templates``, and of
            every editor; see ``LocateModule``.

    Raises:
        ValueError: If there is no such kind of key.

    References:
        Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing,
        arXiv 2403.07175, section 4.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.07175"

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        key: KeyKind = "averaged",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        self.key = key

    @override
    def edited_names(self, tree: ModelTree) -> list[str]:
        return [only_site(self.sites(tree), type(self).__name__).name]

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        [site] = self.sites(self.tree)
        batch, found, failed = self.find_target_values(batch, site.layer)
        factor = self.factor(site.layer)  # C = L Lᵀ
        changes = RankOneChanges(site, self.session.device)
        keys = site.kept(found.keys)
        if self.key == "prompt":
            keys, lacking = keys[:, 0], found.deltas
        else:
            keys = self.mean_keys(keys)
            lacking = found.values - self.mean_keys(found.outputs)
        directions = whiten(keys, factor)  # u = C⁻¹ k of each, [E, M]
        for e, request in enumerate(batch.requests):
            direction, key = directions[e], keys[e]
            # v* − W k, where later requests see what earlier ones of the batch wrote.
            residual = lacking[e] - changes.at(key)
            u, v, _ = rank_one_update(residual, direction, key)  # ΔW = (v* − W k) uᵀ / (u · k)
            changes.add(request, u, v, key)
        return changes.edit(batch.requests, found, failed)
