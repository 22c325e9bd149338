# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Figures against values worked out by hand, and tables that no text breaks."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from lightning_edit.benchmark.figure import Figure
from lightning_edit.benchmark.rows import COLUMNS
from lightning_edit.benchmark.statistics import figures, frame_of
from lightning_edit.benchmark.store import CellRecord
from lightning_edit.benchmark.tables import sections, write_tables
from lightning_edit.functional import wilson_interval

HOSTILE = '<script>alert("a|b")</script> & \\input{x} % $y_1$\n# z'
# Scores of two requests: one with three rephrasings, one with one.
SCORES = {"good": [[1, 1, 1], [0]], "bad": [[1, 0, 0], [0]]}


def rows_of(
    cell: str, scores: Sequence[Sequence[float]], metric: str = "generality"
) -> list[dict[str, object]]:
    return [
        {
            **dict.fromkeys(COLUMNS),
            "cell": cell,
            "request_id": f"r{i}",
            "edits": 1,
            "is_final": True,
            "metric": metric,
            "kind": "one_hop" if metric == "portability" else "",
            "probe": j,
            "teacher_forced": score,
            "teacher_forced_before": 0.0,
            "autoregressive": bool(score and j == 0),
            "autoregressive_before": False,
            "seconds": 2.0 + i,
        }
        for i, part in enumerate(scores)
        for j, score in enumerate(part)
    ]


def found(label: str = "facts", metric: str = "generality") -> dict[tuple[str, ...], Figure]:
    rows = [row for cell, scores in SCORES.items() for row in rows_of(cell, scores, metric)]
    labels = {cell: (label, "independent", cell) for cell in SCORES}
    records = {
        cell: CellRecord(status="done", failed=0, requests=2, peak_memory_bytes=2**30)
        for cell in SCORES
    }
    numbers = figures(pd.DataFrame(rows), labels, records, "good")
    return {(f.method, f.metric, f.kind, f.reading): f for f in numbers}


def test_figures_are_those_of_the_rows() -> None:
    by_name = found()
    good = by_name["good", "generality", "", "teacher_forced"]
    assert (good.value, good.n, good.requests, good.before) == (0.75, 4, 2, 0.0)
    # All draws of two requests: 3/3, 3/4 twice, 0/1.
    assert (good.low, good.high) == (0.0, 1.0)
    assert good.gap == pytest.approx(0.75 - 0.25)
    bad = by_name["bad", "generality", "", "teacher_forced"]
    assert bad.value == 0.25
    assert bad.reference == "good"
    assert bad.difference == pytest.approx(-0.5)
    # The same draws on both sides: -2/3, -1/2 twice, 0.
    assert (bad.difference_low, bad.difference_high) == pytest.approx((-2 / 3, 0.0))
    assert bad.p == 1.0  # of two requests one differs: either sign is as extreme
    assert math.isnan(good.difference)
    unedited = by_name["unedited", "generality", "", "autoregressive"]
    assert (unedited.value, unedited.edits, unedited.n) == (0.0, 0, 4)
    # The bootstrap would be sure of it after two requests.
    assert (unedited.low, unedited.high) == pytest.approx(wilson_interval(0.0, 2))
    assert by_name["good", "seconds", "", ""].value == 2.5
    assert by_name["good", "peak_memory_bytes", "", ""].value == 2**30


def test_kinds_stand_by_themselves_and_in_the_whole() -> None:
    by_name = found(metric="portability")
    whole = by_name["bad", "portability", "", "teacher_forced"]
    of_kind = by_name["bad", "portability", "one_hop", "teacher_forced"]
    assert (whole.value, whole.n) == (of_kind.value, of_kind.n) == (0.25, 4)
    [section] = sections(list(by_name.values()))
    assert section.tables[-1].columns == ["method", ">portability: one hop (n = 4)"]
    assert ("good", "0.75 / 0.25") in section.tables[-1].rows


def test_one_probe_a_request_has_the_interval_of_wilson() -> None:
    rows = rows_of("a", [[1], [1], [0]], "reliability")
    record = CellRecord(status="done")
    [row, *_] = [
        f
        for f in figures(pd.DataFrame(rows), {"a": ("d", "p", "a")}, {"a": record}, "a")
        if f.method == "a" and f.metric == "reliability"
    ]
    assert (row.low, row.high) == pytest.approx(wilson_interval(2 / 3, 3))


def test_where_no_picture_can_be_shown_a_sequence_is_a_table(tmp_path: Path) -> None:
    numbers = [
        Figure(
            "facts",
            "sequential",
            method,
            edits,
            edits == 4,
            "locality",
            reading=reading,
            value=value,
        )
        for method, values in (("A", (1.0, 0.5)), ("B", (0.9, 0.25)))
        for edits, value in zip((2, 4), values, strict=True)
        for reading in ("teacher_forced", "autoregressive")
    ]
    numbers += [replace(numbers[0], method="unedited", edits=0, is_final=True)]
    [section] = sections(numbers)
    [along] = section.along
    assert along.columns == ["method", ">after 2", ">after 4"]
    assert along.rows == [("A", "1.00 / 1.00", "0.50 / 0.50"), ("B", "0.90 / 0.90", "0.25 / 0.25")]
    paths = write_tables(tmp_path, "study", numbers, {}, [])
    texts = {path.suffix: path.read_text(encoding="utf-8") for path in paths}
    assert "| A | 1.00 / 1.00 | 0.50 / 0.50 |" in texts[".md"]
    assert "A & 1.00 / 1.00 & 0.50 / 0.50" in texts[".tex"]
    assert along.title not in texts[".html"]  # which has the curves
    [alone] = sections([figure for figure in numbers if figure.is_final])
    assert not alone.along


@pytest.mark.parametrize(("methods", "lines"), [(6, [6]), (7, [4, 3]), (13, [5, 5, 3])])
def test_charts_share_methods_out(methods: int, lines: list[int]) -> None:
    numbers = [
        Figure(
            "f", "sequential", f"m{i}", at, at == 4, "locality", reading="autoregressive", value=1
        )
        for i in range(methods)
        for at in (2, 4)
    ]
    [section] = sections(numbers)
    assert [len(curve.values.cells) for curve in section.curves] == lines


def test_no_label_breaks_a_table(tmp_path: Path) -> None:
    numbers = list(found(HOSTILE).values())
    paths = write_tables(tmp_path, "study", numbers, {"model": HOSTILE}, [HOSTILE])
    texts = {path.suffix: path.read_text(encoding="utf-8") for path in paths}
    assert texts[".html"].count("<script") == 1  # the page's own, the only one that its policy runs
    digest = hashlib.sha256(texts[".html"].split("<script>")[1].split("</script>")[0].encode())
    source = f"script-src &#39;sha256-{base64.b64encode(digest.digest()).decode()}&#39;"
    assert html.unescape(source) in html.unescape(texts[".html"])
    assert "&lt;script&gt;" in texts[".html"]
    assert "default-src &#39;none&#39;" in texts[".html"]
    assert "<script" not in texts[".md"]
    tables = [line for line in texts[".md"].splitlines() if line.startswith("|")]
    assert tables
    assert len([line for line in texts[".md"].splitlines() if line.startswith("# ")]) == 1
    assert "\\input{" not in texts[".tex"]
    assert "\\textbackslash{}input\\{x\\} \\% \\$y\\_1\\$ \\# z" in texts[".tex"]
    assert texts[".tex"].count("\\begin{tabular}") == texts[".tex"].count("\\end{tabular}") == 3
    with (tmp_path / "study.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["data"] for row in rows} == {HOSTILE}
    assert len(rows) == len(frame_of(numbers))
    assert list(rows[0]) == list(Figure.__dataclass_fields__)
