# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""CounterFact's four rates."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_edit.metrics import (
    EditScore,
    EfficacySuccess,
    NeighborhoodSuccess,
    ParaphraseSuccess,
)

NEW = torch.tensor([0.1, 2.0, 1.0, 0.3])
OLD = torch.tensor([0.2, 1.0, 1.0, 4.0])


def test_successes_and_ties() -> None:
    efficacy, paraphrase, neighborhood = (
        EfficacySuccess(),
        ParaphraseSuccess(),
        NeighborhoodSuccess(),
    )
    for metric in (efficacy, paraphrase, neighborhood):
        metric.update(NEW, OLD)
        assert metric.count() == 4
    # Rows: new wins, old wins, tie, new wins.
    assert efficacy.compute() == paraphrase.compute() == 0.5
    assert neighborhood.compute() == 0.25


def test_edit_score_gathers_before_it_takes_the_mean() -> None:
    metric = EditScore()
    metric.update(torch.ones(2), torch.tensor([1.0, 0.0]), torch.zeros(1))
    assert metric.compute() == 0
    metric.update(neighborhood=torch.ones(3))
    expected = 3 / (1 / 1 + 1 / 0.5 + 1 / 0.75)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-15)
    other = metric.clone()
    other.reset()
    assert math.isnan(other.compute())
    other.merge_state(metric)
    assert other.compute() == metric.compute()


def test_edit_score_without_one_rate_is_nan() -> None:
    metric = EditScore()
    metric.update(torch.ones(2), torch.ones(2))
    assert math.isnan(metric.compute())


def test_edit_score_survives_half_precision() -> None:
    metric = EditScore().to(torch.bfloat16)
    half = torch.tensor([1.0, 0.0] * 500)
    metric.update(half, half, half)
    assert metric.compute().item() == 0.5
