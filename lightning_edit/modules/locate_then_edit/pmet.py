# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""PMET: precise model editing."""

# Shapes: E requests, D hidden.

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_edit.modules.locate_then_edit.ridge_edit import RidgeEditModule
from lightning_edit.passes.tail import Place

__all__ = ["PMET"]


class PMET(RidgeEditModule):
    """Precise model editing: target values for MLP and attention, of which only the MLP's is kept.

    What the residual stream has to gain is looked for in the outputs of both sublayers at once, so
    that the MLP need not store what attention would rather say. Layers are written as MEMIT writes
    them, ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹, each with the part 1 / √n of what the MLP of the last one lacks,
    n being the layers still to come.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. When None, five up to a quarter
            of the depth.
        nll_factor: Factor of the targets' negative log-likelihood. While all target tokens are the
            likeliest, a tenth of it counts, and a request is finished once its divergence, with
            its factor, is at most 0.01.
        kl_factor: Factor of the divergence on the anchor prompt.
        kwargs: ``moment_weight`` and ``written_share``, and the arguments of every mass editor, of
            every locate-then-edit method, and of every editor; see ``RidgeEditModule``.

    Raises:
        ValueError: If a factor is out of its range.

    References:
        PMET: Precise Model Editing in a Transformer, arXiv 2308.08742, sections 4.2 and 4.3.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2308.08742"
    place: ClassVar[Place] = "sublayers"

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        nll_factor: float = 1.0,
        kl_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, kl_factor=kl_factor, **kwargs)
        if nll_factor <= 0:
            raise ValueError(f"`nll_factor` is expected to be above 0, but got {nll_factor}.")
        self.settings = replace(self.settings, nll_factor=nll_factor, settles=True)

    @override
    def portion(self, lacking: Tensor, layers: int) -> Tensor:
        return lacking / math.sqrt(layers)
