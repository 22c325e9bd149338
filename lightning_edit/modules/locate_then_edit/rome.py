# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""ROME: rank-one model editing."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_edit.modules.locate_then_edit.rank_one import RankOneModule
from lightning_edit.modules.locate_then_edit.target_values import TargetValues

__all__ = ["ROME"]


class ROME(RankOneModule):
    """Rank-one model editing: stores one key-value pair in one MLP, smallest change first.

    With k the key of the subject, averaged over context templates, v* the target value and C the
    second moment of keys, each request adds ΔW = (v* − W k₀) uᵀ / (u · k₀), u = C⁻¹ k, where k₀ is
    the key in the bare prompt. Target values of a batch are optimized together; the rank-one
    updates follow one another.

    References:
        Locating and Editing Factual Associations in GPT, arXiv 2202.05262, section 3.1.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2202.05262"

    @override
    def pair(self, found: TargetValues, e: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.mean_keys(found.keys[e]), found.keys[e, 0], found.deltas[e]
