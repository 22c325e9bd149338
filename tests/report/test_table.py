# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The metrics table in its four forms."""

from __future__ import annotations

import csv
import io
import re
import sys

import pytest

from lightning_edit.core.errors import MissingDependencyError
from lightning_edit.report import MetricRow, RunReport, metrics_table
from lightning_edit.report.glossary import sort_metrics
from tests.report.sample import sample

ROWS = [
    ("Reliability", "teacher-forced", "0.000", "1.000", "0.440 – 1.000", "3"),
    ("Reliability", "autoregressive", "0.000", "0.667", "0.210 – 0.940", "3"),
    ("Locality", "teacher-forced", "1.000", "0.900", "0.500 – 0.990", "4"),
    ("Locality", "KL divergence (nats)", "0", "0.0312", "–", "4"),
    ("Portability (one hop)", "autoregressive", "–", "–", "–", "0"),
]


def test_markdown() -> None:
    lines = metrics_table(sample(), "md").split("\n")
    assert lines[0] == "| metric | reading | before | after | 95 % interval | n |"
    assert lines[2:] == [f"| {' | '.join(row)} |" for row in ROWS]


def test_kinds_come_after_the_whole() -> None:
    keys = ["x", "portability/one_hop/teacher_forced", "s", "portability/autoregressive", "x/a"]
    assert sort_metrics(keys) == [
        "portability/autoregressive", "portability/one_hop/teacher_forced", "s", "x", "x/a",
    ]  # fmt: skip


def test_latex() -> None:
    lines = metrics_table(sample(), "latex").split("\n")
    assert lines[0] == r"\begin{tabular}{llrrrr}"
    assert lines[2] == r"metric & reading & before & after & 95 \% interval & n \\"
    assert lines[4] == r"Reliability & teacher-forced & 0.000 & 1.000 & 0.440 -- 1.000 & 3 \\"
    strange = RunReport(method="ROME", metrics={"a_b%c&d/e#": MetricRow(1, 1, 1)})
    row = metrics_table(strange, "latex").split("\n")[4]
    assert row.startswith(r"A b\%c\&d & e\# & 1 &")
    assert len(re.findall(r"(?<!\\)&", row)) == 5


def test_csv_keeps_every_digit() -> None:
    rows = list(csv.DictReader(io.StringIO(metrics_table(sample(), "csv"))))
    assert [row["metric"] for row in rows][-1] == "portability/one_hop"
    assert float(rows[1]["after"]) == 2 / 3
    assert (rows[1]["ci_low"], rows[1]["ci_high"]) == ("0.21", "0.94")
    assert (rows[4]["before"], rows[4]["after"], rows[4]["ci_low"]) == ("", "", "")


def test_rich() -> None:
    console = pytest.importorskip("rich.console").Console(width=100, file=io.StringIO())
    report = RunReport(method="ROME", metrics={**sample().metrics, "x[red]": MetricRow(1, 2, 3)})
    console.print(metrics_table(report, "rich"))
    lines = [line for line in console.file.getvalue().split("\n") if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert cells[0] == list(ROWS[0])
    assert cells[1] == ["", *ROWS[1][1:]]  # the metric is not said twice
    assert cells[5] == ["X[red]", "", "1", "2", "–", "3"]


def test_rich_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(MissingDependencyError, match=r"lightning-edit\[cli\]"):
        metrics_table(sample(), "rich")


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ValueError, match="'md', 'latex' or 'csv', but got 'xml'"):
        metrics_table(sample(), "xml")  # type: ignore[call-overload]
