# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""How far a rate over few rows can be trusted."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["wilson_interval"]


def wilson_interval(rate: float, n: int, level: float = 0.95) -> tuple[float, float]:
    r"""Score interval of a rate observed over n independent rows.

    .. math:: \frac{1}{1 + z^2/n} \left( p + \frac{z^2}{2n}
              \pm z \sqrt{\frac{p (1 - p)}{n} + \frac{z^2}{4 n^2}} \right)

    with z the two-sided normal quantile of the level. Scores between 0 and 1, such as token
    accuracies, may be averaged into the rate as well as zeros and ones: their variance is at most
    p (1 - p), so the interval is then conservative. Probes of one request hang together; where
    several of them are pooled the interval is too narrow.

    Args:
        rate: Mean score p, in [0, 1]. Divide a number of successes by n.
        n: Number of rows.
        level: Coverage, between 0 and 1.

    Returns:
        Lower and upper end, in [0, 1]; ``(nan, nan)`` for n = 0.

    Raises:
        ValueError: If the rate or level is out of range, or n is negative.

    Examples:
        >>> low, high = wilson_interval(0.9, 10)
        >>> round(low, 3), round(high, 3)
        (0.596, 0.982)

    References:
        Wilson (1927), doi 10.1080/01621459.1927.10502953.
    """
    if n < 0:
        raise ValueError(f"`n` is expected to be at least 0, but got {n}.")
    if not 0 < level < 1:
        raise ValueError(f"`level` is expected to lie between 0 and 1, but got {level}.")
    if n == 0:
        return math.nan, math.nan
    if not 0 <= rate <= 1:
        raise ValueError(
            f"`rate` is expected to lie in [0, 1], but got {rate}. "
            "Divide a number of successes by `n`."
        )
    z = NormalDist().inv_cdf((1 + level) / 2)
    center = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The ends are exact at 0 and 1, where rounding would leave them just beside.
    low = 0.0 if rate == 0 else max(0.0, (center - half) / scale)
    high = 1.0 if rate == 1 else min(1.0, (center + half) / scale)
    return low, high
