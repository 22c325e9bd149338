# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""functional/intervals.py against the equation that defines the interval."""

from __future__ import annotations

import math

import pytest

from lightning_edit.functional import wilson_interval


@pytest.mark.parametrize("n", [1, 7, 100, 5000])
@pytest.mark.parametrize("rate", [0.01, 0.5, 2 / 3, 0.99])
def test_ends_solve_the_score_equation(rate: float, n: int) -> None:
    # Ends are the true rates whose score statistic is the normal quantile, here 1.959963985.
    for end in wilson_interval(rate, n):
        assert 0 < end < 1
        assert abs(rate - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.959963985)


def test_published_values() -> None:
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20 and 1 of 29.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, n), ends in published.items():
        assert wilson_interval(successes / n, n) == pytest.approx(ends, abs=5e-5)


def test_ends_of_the_scale_are_exact() -> None:
    for n in range(1, 200):
        assert wilson_interval(0.0, n)[0] == 0
        assert wilson_interval(1.0, n)[1] == 1
        low, high = wilson_interval(1 / 3, n)
        mirrored = wilson_interval(2 / 3, n)
        assert (1 - high, 1 - low) == pytest.approx(mirrored)


def test_level_widens_and_rows_narrow() -> None:
    def width(n: int, level: float) -> float:
        low, high = wilson_interval(0.3, n, level)
        return high - low

    assert width(50, 0.99) > width(50, 0.95) > width(200, 0.95)


def test_no_rows_and_wrong_arguments() -> None:
    assert all(math.isnan(end) for end in wilson_interval(math.nan, 0))
    with pytest.raises(ValueError, match="Divide"):
        wilson_interval(3, 4)
    with pytest.raises(ValueError, match="`rate`"):
        wilson_interval(math.nan, 4)
    with pytest.raises(ValueError, match="`n`"):
        wilson_interval(0.5, -1)
    with pytest.raises(ValueError, match="`level`"):
        wilson_interval(0.5, 4, level=95)
