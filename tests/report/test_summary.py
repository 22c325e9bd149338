# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The sentence and the counts say what the rows say, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_edit.report import EditRow, MetricRow, ProbeRow, RunReport, headline
from lightning_edit.report.summary import (
    Gap,
    Outcome,
    gap_sentence,
    gaps,
    outcomes,
    probe_passed,
    select_edits,
    success,
)
from tests.report.sample import sample

FREE, FORCED = "reliability/autoregressive", "reliability/teacher_forced"


def _run(*after: float | None, before: float | None = None, key: str = FREE) -> RunReport:
    edits = tuple(
        EditRow(str(i), "p", before={key: before}, after={key: value})
        for i, value in enumerate(after)
    )
    return RunReport(method="ROME", edits=edits)


def test_counts_of_the_sample() -> None:
    assert outcomes(sample()) == {
        "reliability": Outcome("reliability", 2, 3, 2 / 3, "autoregressive"),
        "generality": Outcome("generality", 3, 3, 1.0, "autoregressive"),
        "locality": Outcome("locality", 2, 3, 2 / 3, "unchanged"),
    }
    assert headline(sample()) == (
        "2 of 3 facts were changed; 2 of 3 neighboring answers stayed as they were."
    )


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (_run(1.0), "The fact was changed."),
        (_run(0.0), "The fact was not changed."),
        (_run(1.0, before=1.0), "The fact was answered as asked, as before the edit."),
        (_run(1.0, 0.5), "1 of 2 facts were changed."),
        (
            _run(1.0, 1.0, before=1.0),
            "2 of 2 facts were answered as asked, all of them already before.",
        ),
        (_run(1.0, 0.5, key=FORCED), "1 of 2 facts were changed (teacher-forced)."),
        (_run(None, None), "2 edits were made; the new answers were not measured."),
        (_run(None), "1 edit was made; the new answers were not measured."),
        (RunReport(method="ROME"), "Nothing was measured."),
        (
            RunReport(
                method="ROME",
                metrics={
                    FREE: MetricRow(0, 0.975, 40),
                    "locality/teacher_forced": MetricRow(1, 0.9, 40),
                },
            ),
            "The new answer is given in 97.5 % of the cases; "
            "90 % of the neighboring answers stayed as they were.",
        ),
    ],
)
def test_headline(report: RunReport, sentence: str) -> None:
    assert headline(report) == sentence


def test_the_strict_reading_decides() -> None:
    edit = EditRow("a", "p", after={FREE: 0.0, FORCED: 1.0})
    assert success(edit) == (False, "autoregressive")
    assert success(replace(edit, after={FORCED: 1.0})) == (True, "teacher_forced")
    forced = ProbeRow("generality", teacher_forced=1.0, autoregressive=False)
    assert probe_passed(forced) is False
    assert probe_passed(replace(forced, autoregressive=None)) is True
    assert probe_passed(ProbeRow("locality", autoregressive=True)) is None


def test_the_mirage_gap() -> None:
    found = gaps(sample())
    assert found == [Gap("Reliability", 1.0, 2 / 3)]
    assert gap_sentence(found).endswith("flatters the edits by 33.3 percentage points.")
    assert gap_sentence([Gap("Reliability", 0.5, 0.51)]).endswith("edits by 1 percentage point.")
    assert gap_sentence([Gap("Reliability", 0.5, 0.5)]).endswith("does not flatter the edits.")
    assert gap_sentence([Gap("Locality", 0.5, 0.4)]) == ""


def test_failed_edits_are_shown_first() -> None:
    edits = _run(1.0, 1.0, 0.0, 1.0, 0.0).edits
    shown, remark = select_edits(edits, limit=3)
    assert [edit.id for edit in shown] == ["0", "2", "4"]
    assert remark.startswith("3 of 5 edits")
    assert select_edits(edits, limit=5) == (list(edits), "")


def test_lost_answers_are_told_apart_from_other_wording() -> None:
    probes = [
        ProbeRow("locality", unchanged=True, lost=False),
        ProbeRow("locality", unchanged=False, lost=False),
        ProbeRow("locality", unchanged=False, lost=True),
        ProbeRow("locality", unchanged=False),
    ]
    report = RunReport(method="ROME", edits=[EditRow("a", "p", after={FREE: 1.0}, probes=probes)])
    assert headline(report) == (
        "The fact was changed; 1 of 4 neighboring answers stayed as they were, and 1 of 3 right "
        "ones were lost."
    )


def test_a_gap_of_another_metric_is_not_passed_over() -> None:
    found = [Gap("Reliability", 1.0, 1.0), Gap("Generality", 0.6, 0.33), Gap("Locality", 1, 1)]
    expected = "does not flatter reliability, but generality by 27 percentage points."
    assert gap_sentence(found).endswith(expected)
