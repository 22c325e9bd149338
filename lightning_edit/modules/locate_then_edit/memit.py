# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""MEMIT: mass-editing memory in a transformer."""

from __future__ import annotations

from typing import ClassVar

from lightning_edit.modules.locate_then_edit.ridge_edit import RidgeEditModule

__all__ = ["MEMIT"]


class MEMIT(RidgeEditModule):
    """Mass-editing memory in a transformer: many pairs at once, by ridge regression, over layers.

    Target values are residual streams behind the last edited layer. From below, each layer takes
    an equal part of what is still lacking there, ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹, with K the keys of the
    batch, R what the layer adds at them and C the second moment of keys.

    References:
        Mass-Editing Memory in a Transformer, arXiv 2210.07229, sections 4.2 and 4.3.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2210.07229"
