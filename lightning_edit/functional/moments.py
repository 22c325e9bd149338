# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Second moments of keys: C = E[k kᵀ], what a linear memory holds already."""

# Shapes: N keys, M their dimensions, E experts.

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["regularize", "second_moment_update", "shrink_to_pool"]

# Whether a GPU's products of bfloat16 can be given out in float32, in which they are summed anyway.
MIXED = hasattr(torch.ops.aten.mm, "dtype")
STRIPS = 4  # strips of rows in which a symmetric sum is made: five eighths of the products


def second_moment_update(total_MM: Tensor, keys_NM: Tensor) -> Tensor:
    """Adds Σ k kᵀ of some keys to a running sum, in float64.

    Sums of parts equal the sum of the whole, so parts may come from several processes.

    Args:
        total_MM: Running sum, [M, M] float64; changed in place.
        keys_NM: Keys, [N, M], any floating dtype.

    Returns:
        The running sum.

    Examples:
        >>> second_moment_update(torch.zeros(2, 2, dtype=torch.float64), torch.eye(2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    is_mixed = MIXED and keys_NM.is_cuda and keys_NM.dtype == torch.bfloat16
    keys = keys_NM if is_mixed else keys_NM.float()
    strip = -(-keys.shape[1] // STRIPS)
    for start in range(0, keys.shape[1], strip):
        end = start + strip
        # From the diagonal on; what lies below it is the same mirrored.
        rows = _product(keys[:, start:end].mT, keys[:, start:]).double()
        total_MM[start:end, start:] += rows
        total_MM[end:, start:end] += rows[:, strip:].mT
    return total_MM


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A product with sums in float32: those of bfloat16 are exact, and fast on tensor cores."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


def shrink_to_pool(totals: Tensor, counts: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Second moments of experts, each drawn towards that of the keys of all of them.

    The pooled moment C counts for as much as a number of keys. So an expert that was sent no token
    has C itself rather than nothing, one that was sent few is near to it, and one that was sent
    many has its own.

    Args:
        totals: Σ k kᵀ over the keys of each expert, [E, M, M].
        counts: Their numbers, [E].
        weight: n, how many keys C counts for.

    Returns:
        Σ k kᵀ + n C, [E, M, M], and the numbers of keys, n more of each.

    Raises:
        ValueError: If there are no keys.

    Examples:
        >>> totals, counts = torch.tensor([[[8.0]], [[0.0]]]), torch.tensor([4, 0])
        >>> total, count = shrink_to_pool(totals, counts, 4)
        >>> total.flatten().tolist(), count.tolist()
        ([16.0, 8.0], [8.0, 4.0])
    """
    if int(counts.sum()) < 1:
        raise ValueError("`counts` is expected to be at least 1 in all, but there are no keys.")
    pooled = totals.sum(0) / counts.sum()
    return totals + weight * pooled, counts + float(weight)


def regularize(moment_MM: Tensor, count: int | Tensor, ridge: float) -> Tensor:
    """The mean C of a sum of N outer products, with a ridge where the keys cannot span the space.

    Args:
        moment_MM: Σ k kᵀ, [M, M]; or of each expert, [E, M, M].
        count: N, the number of keys in the sum; or those of the experts, [E].
        ridge: Share of the mean eigenvalue added to the diagonal.

    Returns:
        C + ridge · tr(C)/M · I, float32, of the same shape.

    Raises:
        ValueError: If there are no keys.

    Examples:
        >>> regularize(torch.eye(2) * 4, 4, 0.5).tolist()
        [[1.5, 0.0], [0.0, 1.5]]
    """
    number = torch.as_tensor(count, device=moment_MM.device)
    if not bool((number >= 1).all()):
        raise ValueError("`count` is expected to be at least 1, but there are no keys.")
    mean = moment_MM.double() / number[..., None, None]
    diagonal = mean.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(ridge * diagonal.mean(-1, keepdim=True))
    return mean.float()
