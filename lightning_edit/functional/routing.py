# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Whether tokens are sent to the experts that they were sent to before."""

# Shapes: E experts.

from __future__ import annotations

from torch import Tensor

__all__ = ["routing_similarity"]


def routing_similarity(preds: Tensor, target: Tensor) -> Tensor:
    """Jaccard similarity |A ∩ B| / |A ∪ B| of the experts that tokens are sent to.

    Args:
        preds: Which experts a token is sent to now, [..., E] bool.
        target: Which it was sent to before, [..., E] bool.

    Returns:
        [...] float32; 1 where there were none and are none.

    Raises:
        ValueError: If the shapes differ.

    Examples:
        >>> import torch
        >>> before = torch.tensor([[True, True, False], [True, False, False]])
        >>> after = torch.tensor([[True, False, True], [True, False, False]])
        >>> [round(float(score), 2) for score in routing_similarity(after, before)]
        [0.33, 1.0]

    References:
        arXiv 2602.10965, where it is averaged over the layers after the edited ones.
    """
    if preds.shape != target.shape:
        raise ValueError(
            f"`preds` and `target` are expected to have one shape, but got {list(preds.shape)} and "
            f"{list(target.shape)}."
        )
    now, before = preds.bool(), target.bool()
    union = (now | before).sum(-1)
    both = (now & before).sum(-1)
    return (both / union.clamp_min(1)).masked_fill(union == 0, 1.0)
