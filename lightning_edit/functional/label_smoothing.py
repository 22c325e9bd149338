# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The likelihood of answers whose labels are smoothed: of KE and T-Patcher."""

# Shapes: N target tokens, V vocabulary.

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["smoothed_nll"]


def smoothed_nll(logits_NV: Tensor, targets_N: Tensor, smoothing: float = 0.1) -> Tensor:
    """Label-smoothed NLL, (1 − ε − ε′) nll + ε′ Σ_v −log p_v with ε′ = ε / (V − 1).

    Args:
        logits_NV: [N, V].
        targets_N: Tokens, [N] int64.
        smoothing: ε, the share that all other tokens have in the target.

    Returns:
        In nats, [N] float32.

    Examples:
        >>> import torch
        >>> smoothed_nll(torch.zeros(1, 2), torch.tensor([0]), 0.0).round(decimals=4)
        tensor([0.6931])

    References:
        The losses of the code of KE (arXiv 2104.08164, section 5.3) and of T-Patcher
        (arXiv 2301.09785).
    """
    size = logits_NV.shape[1]
    # PyTorch's own smoothing gives the target its share, too.
    share = smoothing * size / (size - 1)
    return cross_entropy(logits_NV.float(), targets_N, reduction="none", label_smoothing=share)
