# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""How much each target token counts in a loss."""

# Shapes: B rows, T positions.

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["token_weights"]


def token_weights(mask: Tensor, *, per_sequence: bool = False) -> Tensor:
    """Weights of target tokens by which a sum of losses becomes a mean; they add up to 1.

    Args:
        mask: True on target tokens, [B, T] bool, one or more in each row.
        per_sequence: Mean over rows of each row's mean, so that short and long targets count
            alike; the mean over all tokens otherwise.

    Returns:
        Weights, [B, T] float32, zero off the mask.

    Examples:
        >>> import torch
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> token_weights(mask).round(decimals=3).tolist()
        [[0.333..., 0.0], [0.333..., 0.333...]]
        >>> token_weights(mask, per_sequence=True).tolist()
        [[0.5, 0.0], [0.25, 0.25]]
    """
    counts = mask.sum(1, keepdim=True) * mask.shape[0] if per_sequence else mask.sum()
    return mask / counts.to(torch.float32)
