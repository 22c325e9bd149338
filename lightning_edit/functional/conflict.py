# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What is left of a fact after an edit that contradicts it, or takes it back.

Li et al., ICLR 2024 (arXiv:2310.02129), section 2. Shapes: B pairs of edits, O right answers of one
prompt. Probabilities are the geometric means of an answer's tokens, exp(-nll).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["conflict_magnitude", "ignore_rate", "knowledge_distortion"]


def conflict_magnitude(nll_before: Tensor, nll_after: Tensor) -> Tensor:
    """Which share of the first edit's probability the second one takes, at least -1.

    Args:
        nll_before: NLL of the first edit's answer, with the first edit alone, in nats, shape [B].
        nll_after: The same with both, shape [B].

    Returns:
        (p_before - p_after) / p_before, shape [B]: 1 where nothing is left of the first edit. A
        rise beyond twofold counts as -1, as in the authors' code.

    Examples:
        >>> from torch import tensor
        >>> conflict_magnitude(tensor([0.0, 0.0, 2.0]), tensor([0.0, 99.0, 0.0]))
        tensor([ 0.,  1., -1.])
    """
    return (1.0 - torch.exp(nll_before - nll_after)).clamp_min(-1.0)


def knowledge_distortion(nll_before: Tensor, nll_after: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the right answers' shares before and after, in nats.

    Args:
        nll_before: NLL of each right answer of a prompt in the unedited model, shape [O].
        nll_after: The same after an edit and one that takes it back, shape [O].

    Returns:
        A scalar in [0, log 2]; 0 where the answers keep their shares. The authors' code divides it
        by the number of answers.

    Examples:
        >>> from torch import tensor
        >>> float(knowledge_distortion(tensor([1.0, 2.0]), tensor([2.0, 3.0])))
        0.0
    """
    p, q = torch.softmax(-nll_before.double(), 0), torch.softmax(-nll_after.double(), 0)
    m = (p + q) / 2
    sides = (torch.special.xlogy(side, side / m).sum() for side in (p, q))
    return (sum(sides, torch.zeros(())) / 2).clamp_min(0.0)


def ignore_rate(nll_before: Tensor, nll_after: Tensor) -> Tensor:
    """Share of the other right answers that have become less likely.

    Args:
        nll_before: NLL of each right answer but the edited one in the unedited model, shape [O].
        nll_after: The same after an edit and one that takes it back, shape [O].

    Returns:
        A scalar in [0, 1].

    Examples:
        >>> from torch import tensor
        >>> float(ignore_rate(tensor([1.0, 2.0]), tensor([2.0, 2.0])))
        0.5
    """
    return (nll_after > nll_before).float().mean()
