# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The folder of results survives whatever stops the program that writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_edit.benchmark.rows import COLUMNS, CellRow
from lightning_edit.benchmark.store import CellRecord, ResultsFolder, _schema
from lightning_edit.core.errors import ArtifactError


def row(**fields: object) -> CellRow:
    empty: dict[str, object] = dict.fromkeys(COLUMNS)
    empty |= {"cell": "a", "request_id": "r", "position": 0, "edits": 1, "is_final": True}
    empty |= {"metric": "reliability", "kind": "", "probe": 0, "prompt": "p", "answers": ["x"]}
    empty |= {"text_before": "", "text": "", "failed": ""}
    return CellRow(**{**empty, **fields})  # type: ignore[typeddict-item]


def test_a_line_cut_short_is_passed_over_and_the_next_one_stands_by_itself(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    folder.add(CellRecord(key="a", status="done"), [row(teacher_forced=0.5)])
    with (tmp_path / folder.CELLS).open("a") as file:
        file.write('{"key": "b", "sta')
    assert list(folder.records()) == ["a"]
    folder.add(CellRecord(key="c", status="failed", error="out of memory"), [])
    assert list(folder.records()) == ["a", "c"]


def test_the_last_line_counts_and_a_cell_without_its_rows_is_not_done(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    folder.add(CellRecord(key="a", status="failed", error="x"), [])
    assert folder.records()["a"]["status"] == "failed"
    folder.add(CellRecord(key="a", status="done"), [row()])
    assert folder.records()["a"]["status"] == "done"
    (tmp_path / "cells" / "a.parquet").unlink()
    assert folder.records() == {}


def test_rows_come_back_with_the_types_of_their_columns(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path)
    folder.add(CellRecord(key="a", status="done"), [row(teacher_forced=0.5, took=True)])
    folder.add(CellRecord(key="b", status="done"), [row(cell="b", prompt="é|\n<i>")])
    frame = folder.frame(["a", "b"])
    assert tuple(frame.columns) == COLUMNS == tuple(_schema().names)
    assert frame["prompt"].tolist() == ["p", "é|\n<i>"]
    assert frame["teacher_forced"].tolist()[0] == 0.5
    assert frame["took"].tolist()[0] is True
    combined = folder.combine(["a", "b"])
    assert combined == tmp_path / "edits.parquet"
    assert folder.combine([]) is None
    assert folder.frame([]).empty
    assert {path.name for path in tmp_path.iterdir()} == {"cells", "cells.jsonl", "edits.parquet"}


def test_damaged_scores_are_named(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"scores\.json` is damaged.*Take it away"):
        ResultsFolder(tmp_path).read_json("scores.json")
