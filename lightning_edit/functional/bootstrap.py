# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""How far means over probes can be trusted whose probes come in groups, one group a request."""

# Shapes: B resamples, R requests, K means that are looked at together.

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cluster_means", "cluster_weights", "percentile_interval", "sign_flip_p"]

SIGNS_AT_ONCE = 500  # choices of signs; all of them together may be larger than the scores


def cluster_weights(requests: int, resamples: int = 2000, seed: int = 0) -> Tensor:
    """How often each request is drawn in each resample with replacement.

    Args:
        requests: R, at least 1.
        resamples: B, at least 1.
        seed: The same seed draws the same on every processor.

    Returns:
        [B, R] float64; each row sums to R.

    Raises:
        ValueError: If a number is below 1.

    Examples:
        >>> cluster_weights(3, resamples=2).sum(1)
        tensor([3., 3.], dtype=torch.float64)
    """
    for name, number in (("requests", requests), ("resamples", resamples)):
        if number < 1:
            raise ValueError(f"`{name}` is expected to be at least 1, but got {number}.")
    generator = torch.Generator().manual_seed(seed)
    drawn_BR = torch.randint(requests, (resamples, requests), generator=generator)
    weights_BR = torch.zeros(resamples, requests, dtype=torch.float64)
    return weights_BR.scatter_add_(1, drawn_BR, torch.ones_like(weights_BR))


def cluster_means(sums_RK: Tensor, counts_RK: Tensor, weights_BR: Tensor) -> Tensor:
    """Means over the probes of resampled requests.

    Probes of one request hang together, so that requests are drawn, each with all its probes. The
    same draws for all K make differences between them paired.

    Args:
        sums_RK: Sum of the scores of each request's probes, [R, K].
        counts_RK: Number of them, [R, K]; 0 where a request has none.
        weights_BR: From ``cluster_weights``, [B, R]; a row of ones gives the means themselves.

    Returns:
        [B, K] float64; nan where no drawn request has a probe.

    Examples:
        >>> sums, counts = torch.tensor([[2.0], [0.0]]), torch.tensor([[2.0], [1.0]])
        >>> cluster_means(sums, counts, torch.tensor([[1.0, 1.0], [2.0, 0.0]])).flatten().tolist()
        [0.6666666666666666, 1.0]

    References:
        Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
    """
    weights_BR = weights_BR.double()
    return (weights_BR @ sums_RK.double()) / (weights_BR @ counts_RK.double())


def percentile_interval(samples_BK: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Ends of the middle part of resampled values, nan aside.

    Args:
        samples_BK: Values of B resamples, [B, K].
        level: Coverage, between 0 and 1.

    Returns:
        Lower and upper ends, [K] float64 each.

    Raises:
        ValueError: If the level is out of range.

    Examples:
        >>> low, high = percentile_interval(torch.arange(101.0)[:, None], 0.9)
        >>> round(float(low), 6), round(float(high), 6)
        (5.0, 95.0)
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` is expected to lie between 0 and 1, but got {level}.")
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low_K, high_K = torch.nanquantile(samples_BK.double(), ends, dim=0)
    return low_K, high_K


def sign_flip_p(differences_RK: Tensor, resamples: int = 10000, seed: int = 0) -> Tensor:
    """Two-sided p of a paired permutation test: had each request's difference either sign alike?

    Args:
        differences_RK: What each request adds to a difference of means, [R, K].
        resamples: Random choices of signs, beside the one that was observed.
        seed: The same seed draws the same on every processor.

    Returns:
        [K] float64: share of the choices whose sum is at least as far from 0 as the observed one,
        which counts among them, so that p is never 0.

    Examples:
        >>> sign_flip_p(torch.zeros(5, 1)).item()
        1.0
        >>> sign_flip_p(torch.ones(20, 1)).item() < 0.001
        True

    References:
        Fisher, The Design of Experiments (1935), section 21; counted as by Phipson and Smyth,
        arXiv 1603.05766.
    """
    generator = torch.Generator().manual_seed(seed)
    differences_RK = differences_RK.double()
    # Sums of the same numbers in other orders differ in their last bits.
    least_K = differences_RK.sum(0).abs() - 1e-9 * differences_RK.abs().sum(0)
    extreme_K = torch.ones(differences_RK.shape[1], dtype=torch.float64)
    for start in range(0, resamples, SIGNS_AT_ONCE):
        shape = (min(SIGNS_AT_ONCE, resamples - start), len(differences_RK))
        signs_BR = 2 * torch.randint(2, shape, generator=generator).double() - 1
        extreme_K += ((signs_BR @ differences_RK).abs() >= least_K).sum(0)
    return extreme_K / (resamples + 1)
