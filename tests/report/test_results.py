# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Report rows keep what they were given, in JSON types."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from lightning_edit.core.errors import ArtifactError
from lightning_edit.report import EditRow, MetricRow, ProbeRow, RunReport
from tests.report.sample import sample


def test_a_report_survives_json() -> None:
    report = sample()
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert RunReport.from_dict(json.loads(text)) == report


def test_what_is_not_finite_becomes_none() -> None:
    row = MetricRow(before=math.inf, after=math.nan, n=2, ci=(0.1, math.nan))
    assert row == MetricRow(before=None, after=None, n=2, ci=None)
    edit = EditRow("a", "p", after={"x": math.nan}, norm=math.nan, diagnostics={"loss": math.inf})
    assert (edit.after, edit.norm, edit.diagnostics) == ({"x": None}, None, {"loss": None})
    assert ProbeRow("locality", teacher_forced=math.nan).teacher_forced is None


def test_settings_of_any_type_become_json() -> None:
    settings = {"path": Path("a/b"), "layers": range(2), "rate": torch.tensor(0.5), "t": (1, None)}
    report = RunReport(
        method="FT", settings=settings, seconds={"total": cast(float, torch.tensor(2.0))}
    )
    expected = {"path": "a/b", "layers": "range(0, 2)", "rate": 0.5, "t": [1, None]}
    assert report.settings == expected
    assert report.seconds == {"total": 2.0}


def test_null_stands_for_the_default() -> None:
    record = {
        "method": "FT",
        "settings": None,
        "edits": [{"id": "a", "prompt": "p", "after": None}],
    }
    report = RunReport.from_dict(record)
    assert report == RunReport(method="FT", edits=[EditRow("a", "p")])


def test_unknown_keys_are_left_aside() -> None:
    assert RunReport.from_dict({"method": "FT", "later": 1}) == RunReport(method="FT")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"method": None, "edits": [{"prompt": "p"}]}, r"here, edits\[0\]: the field `id`"),
        ({"metrics": {"x": {"after": "high"}}}, r"here, metrics\['x'\]: expected numbers"),
        ({"metrics": {"x": {"ci": [1.0]}}}, "a pair `ci`"),
        ({"metrics": [1]}, "`metrics` is expected to be a mapping"),
        ({"edits": ["text"]}, "expected a mapping of fields, but got 'text'"),
    ],
)
def test_damage_is_named(damage: dict[str, object], message: str) -> None:
    record = {**replace(sample(), edits=(), metrics={}).to_dict(), **damage}
    with pytest.raises(ArtifactError, match=message):
        RunReport.from_dict(record, where="here")
    with pytest.raises(ArtifactError, match="the field `method` is missing"):
        RunReport.from_dict({})
