# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""How far a model knows a fact: the measure by which CaliNET finds false ones."""

# Shapes: C prompts of wrong relations.

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["calibration_score"]


def calibration_score(own: Tensor, others: Tensor) -> Tensor:
    """CKA: an answer's probability after its prompt over its mean after prompts of wrong relations.

    At 1 the prompt does no more for the answer than a wrong relation does: the model has the
    answer for the subject at best, and not the fact. Below, it has it false.

    Args:
        own: log P(answer | prompt) in nats, [...].
        others: log P(answer | prompt of a wrong relation) in nats, [..., C].

    Returns:
        [...] float32, at least 0.

    Raises:
        ValueError: If C is 0.

    References:
        Calibrating Factual Knowledge in Pretrained Language Models, arXiv 2210.03329, section 2.2.

    Examples:
        >>> others = torch.tensor([0.1, 0.2, 0.3]).log()
        >>> calibration_score(torch.tensor(0.4).log(), others).round(decimals=4)
        tensor(2.)
    """
    if not others.shape[-1]:
        raise ValueError("`others` is expected to hold at least one prompt of a wrong relation.")
    mean = torch.logsumexp(others.float(), -1) - math.log(others.shape[-1])
    return torch.exp(own.float() - mean)
