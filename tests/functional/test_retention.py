# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""functional/retention.py against plain loops over the formulas."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_edit.functional import (
    average_retention,
    early_retention,
    edits_held,
    forgetting,
    retention_area,
    retention_by_age,
)

NAN = math.nan
STEPS = [2, 3, 6]


def matrix(size: int, columns: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(0)
    rows: list[list[float]] = torch.rand(size, columns, generator=generator).tolist()
    return rows


def test_every_step_against_loops() -> None:
    r = matrix(5, 5)
    average = [sum(r[t][: t + 1]) / (t + 1) for t in range(5)]
    forgotten = [
        sum(max(r[s][k] for s in range(k, t + 1)) - r[t][k] for k in range(t + 1)) / (t + 1)
        for t in range(5)
    ]
    values = torch.tensor(r, dtype=torch.float64)
    assert average_retention(values).tolist() == pytest.approx(average)
    assert forgetting(values).tolist() == pytest.approx(forgotten)
    assert max(forgotten) > 0.05
    assert early_retention(values, 2) == pytest.approx((r[4][0] + r[4][1]) / 2)


def test_rows_at_chosen_steps() -> None:
    r = matrix(3, 6)
    values = torch.tensor(r, dtype=torch.float64)
    average = [sum(row[:t]) / t for row, t in zip(r, STEPS, strict=True)]
    assert average_retention(values, STEPS).tolist() == pytest.approx(average)
    # Edit k is first seen at the row after it was made: rows 0, 0, 1, 2, 2, 2.
    first = [0, 0, 1, 2, 2, 2]
    last = sum(max(r[s][k] for s in range(first[k], 3)) - r[2][k] for k in range(6)) / 6
    assert forgetting(values, STEPS)[2].item() == pytest.approx(last)
    assert early_retention(values, 6, STEPS) == pytest.approx(sum(r[2]) / 6)


def test_entries_of_edits_not_yet_made_do_not_matter() -> None:
    known = torch.tensor([[1.0, 0.9, 0.9], [0.5, 0.4, 0.9], [0.5, 0.2, 1.0]])
    unknown = torch.tensor([[1.0, NAN, NAN], [0.5, 0.4, NAN], [0.5, 0.2, 1.0]])
    # Edit 1 was right before it was made (0.9); that is nothing the sequence could forget.
    for values in (known, unknown):
        assert average_retention(values).tolist() == pytest.approx([1, 0.45, 1.7 / 3])
        assert forgetting(values).tolist() == pytest.approx([0, 0.25, (0.5 + 0.2) / 3])


def test_edits_held_needs_both_conditions() -> None:
    average = torch.tensor([1.0, 0.7, 0.8, 0.5])
    drop = torch.tensor([0.0, 0.1, 0.2, 0.3])
    assert edits_held(average, 0.8) == 3
    assert edits_held(average, 0.8, drop, max_drop=0.15) == 1
    assert edits_held(average, 0.5, drop, max_drop=0.15) == 2
    assert edits_held(average, 0.5, drop, max_drop=0.5) == 4
    assert edits_held(average, 0.8, steps=[1, 10, 100, 1000]) == 100
    assert edits_held(average[1:], 0.9) == 0
    with pytest.raises(ValueError, match="capability_drop"):
        edits_held(average, 0.8, drop[:2])


def test_retention_area_on_the_logarithmic_axis() -> None:
    average, steps = [1.0, 0.6, 0.2], [1, 2, 8]
    # Axis 0, 1, 3 in doublings.
    expected = (0.8 * 1 + 0.4 * 2) / 3
    assert retention_area(torch.tensor(average), steps) == pytest.approx(expected)
    assert retention_area(torch.full((7,), 0.3, dtype=torch.float64)) == pytest.approx(0.3)
    assert retention_area(torch.tensor([0.25])) == 0.25


def test_wrong_matrices_and_steps() -> None:
    values = torch.ones(2, 2)
    for steps in ([1], [2, 1], [1, 1], [0, 1]):
        with pytest.raises(ValueError, match="`steps`"):
            average_retention(values, steps)
    with pytest.raises(ValueError, match="names 3 edits"):
        forgetting(values, [1, 3])
    with pytest.raises(ValueError, match=r"\[S, K\]"):
        average_retention(values[0])
    with pytest.raises(ValueError, match="nan"):
        average_retention(torch.tensor([[1.0, NAN], [NAN, 1.0]]))
    for m in (0, 3):
        with pytest.raises(ValueError, match="`m`"):
            early_retention(values, m)
    with pytest.raises(ValueError, match="`steps`"):
        retention_area(torch.ones(0))


def test_by_age_against_loops() -> None:
    r = matrix(3, 6)
    found = retention_by_age(torch.tensor(r, dtype=torch.float64), STEPS)
    for age in range(6):
        seen = [row[t - 1 - age] for row, t in zip(r, STEPS, strict=True) if t > age]
        assert found[age].item() == pytest.approx(sum(seen) / len(seen))
    assert len(found) == 6
    # What was not made yet does not count, whatever stands there.
    early = torch.tensor([[1.0, NAN, NAN], [0.5, 0.25, NAN]])
    assert retention_by_age(early).tolist() == [0.625, 0.5]
