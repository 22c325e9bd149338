# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""functional/bootstrap.py against values worked out by hand and by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_edit.functional import (
    cluster_means,
    cluster_weights,
    percentile_interval,
    sign_flip_p,
)


def test_means_of_all_resamples_by_hand() -> None:
    # Two requests: three probes with two hits, one probe with none. All four draws of two.
    sums, counts = torch.tensor([[2.0], [0.0]]), torch.tensor([[3.0], [1.0]])
    weights = torch.tensor([[2.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    means = cluster_means(sums, counts, weights)[:, 0].tolist()
    assert means == pytest.approx([2 / 3, 1 / 2, 1 / 2, 0.0])


def test_draws_are_those_of_the_seed_and_have_the_spread_of_the_theory() -> None:
    weights = cluster_weights(40, resamples=4000, seed=3)
    assert weights.sum(1).tolist() == [40.0] * 4000
    assert torch.equal(weights, cluster_weights(40, resamples=4000, seed=3))
    assert not torch.equal(weights, cluster_weights(40, resamples=4000, seed=4))
    # Of n draws a mean of zeros and ones varies by sqrt(p (1 - p) / n).
    hits = (torch.arange(40) < 10).double()[:, None]
    means = cluster_means(hits, torch.ones(40, 1), weights)
    assert float(means.mean()) == pytest.approx(0.25, abs=0.01)
    assert float(means.std()) == pytest.approx(math.sqrt(0.25 * 0.75 / 40), rel=0.08)


def test_probes_that_hang_together_widen_the_interval() -> None:
    # Ten requests of nine probes each, all of which are hit or missed together.
    sums = 9 * (torch.arange(10) < 5).double()[:, None]
    weights = cluster_weights(10)
    low, high = percentile_interval(cluster_means(sums, torch.full((10, 1), 9.0), weights))
    alone = cluster_weights(90)
    hits = (torch.arange(90) < 45).double()[:, None]
    pooled_low, pooled_high = percentile_interval(cluster_means(hits, torch.ones(90, 1), alone))
    assert float(high - low) > 2 * float(pooled_high - pooled_low)


def test_p_is_that_of_all_signs() -> None:
    differences = [0.5, 0.2, 0.2, -0.1, 0.3, 0.0, 0.4]
    observed = abs(sum(differences)) - 1e-9
    signs = itertools.product((-1, 1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(row, differences, strict=True))) for row in signs]
    exact = sum(total >= observed for total in sums) / len(sums)
    found = sign_flip_p(torch.tensor(differences)[:, None])
    assert float(found) == pytest.approx(exact, abs=0.015)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="`requests`"):
        cluster_weights(0)
    with pytest.raises(ValueError, match="`level`"):
        percentile_interval(torch.zeros(2, 1), 1.0)
    # A resample without a probe says nothing, and is left out of the ends.
    low, high = percentile_interval(torch.tensor([[math.nan], [0.5], [0.5]]))
    assert (float(low), float(high)) == (0.5, 0.5)
