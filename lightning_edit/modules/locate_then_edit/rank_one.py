# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What rank-one editors share: one pair after another into one matrix."""

# Shapes: E requests, T templates, D hidden, M inputs of the edited projection.

from __future__ import annotations

from abc import abstractmethod

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.change import LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import EditError, LocatorError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.locator import ModelTree, WeightSite
from lightning_edit.functional.rank_one import rank_one_update, whiten
from lightning_edit.modules.locate_then_edit.base import LocateModule
from lightning_edit.modules.locate_then_edit.target_values import TargetValues

__all__ = ["RankOneModule"]

# Below this cosine of u and k the update is large and hits other keys: the collapse of ROME.
SMALL_DIVISOR = 0.1


class RankOneModule(LocateModule):
    """Base of editors that store one key-value pair a request in one MLP, smallest change first.

    A subclass says by ``pair`` which keys it means. Target values of a batch are optimized
    together; the rank-one updates ΔW = r uᵀ / (u · k), u = C⁻¹ d, follow one another.

    References:
        Locating and Editing Factual Associations in GPT, arXiv 2202.05262, section 3.1.
    """

    @abstractmethod
    def pair(self, found: TargetValues, e: int) -> tuple[Tensor, Tensor, Tensor]:
        """What one request stores.

        Args:
            found: Target values of the batch.
            e: Index of the request.

        Returns:
            Key d that the direction is made from, [M]; key k at which the pair is stored, [M]; and
            what the unedited matrix lacks there, r = v* − W k, [D].
        """

    @override
    def sites(self, tree: ModelTree) -> list[WeightSite]:
        sites = super().sites(tree)
        if len(sites) != 1:
            raise LocatorError(
                f"{type(self).__name__} edits one layer, but `layers` names {len(sites)}. Give "
                "one, or choose a method that spreads an edit over layers."
            )
        return sites

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        tree = self.tree
        [site] = self.sites(tree)
        batch, found, failed = self.find_target_values(batch, site.layer)
        moment = self.second_moment(site.layer)
        weight = site.read(self.model)
        change = torch.zeros(site.out_features, site.in_features, device=weight.device)
        left, right = [], []
        rows: list[RequestFigures] = []
        for e, request in enumerate(batch.requests):
            source, key, residual = self.pair(found, e)
            direction = whiten(source, moment)
            # Later requests see what earlier ones of the batch wrote.
            u, v, divisor = rank_one_update(residual - change @ key, direction, key)
            cosine = float(divisor / torch.linalg.vector_norm(key))
            if abs(cosine) < SMALL_DIVISOR:
                rank_zero_warn(
                    f"Request {request.id!r}: the update direction and the key have a cosine of "
                    f"only {cosine:.3f}, so the update is large and may damage other facts. "
                    "Add context templates, or edit another layer."
                )
            change += u @ v.T
            left.append(u)
            right.append(v)
            rows.append(
                {
                    "id": request.id,
                    "norm": float(torch.linalg.vector_norm(u)),
                    "loss": found.losses[e][-1]["total"],
                    "steps": len(found.losses[e]),
                    "p_target": found.probabilities[e],
                }
            )
        if not bool(torch.isfinite(change).all()):
            raise EditError("The update is not finite. Nothing was written.")
        factors = (torch.cat(left, 1), torch.cat(right, 1))
        u_all, v_all = factors[::-1] if site.transposed else factors
        edit = WeightDelta({site.name: LowRank(u_all, v_all)})
        edit.details = {
            "requests": rows,
            "failed": failed,
            "target_values": found,
            "layer": site.layer,
        }
        return edit
