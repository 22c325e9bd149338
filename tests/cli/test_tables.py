# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What verbs return is printed whole in a pipe, and within the width of a terminal."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from lightning_edit.artifacts.outcomes import (
    Comparison,
    EntryRow,
    Offer,
    ParameterRow,
    Rendered,
    SavedEdit,
    Written,
)
from lightning_edit.cli.tables import show, tables
from lightning_edit.report import MetricRow, RunReport

NAME = "layers.17.down_proj.weight"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _printed(result: object, file: io.StringIO | None = None) -> str:
    file = file or io.StringIO()
    show(result, file)
    return file.getvalue()


def _on_terminal(result: object, monkeypatch: pytest.MonkeyPatch, width: int) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    return re.sub(r"\x1b\[[0-9;]*m", "", _printed(result, _Terminal()))


COMPARED = Comparison(
    "run/delta",
    "other/delta",
    (
        ParameterRow(NAME, 0.5, 1234.5, 0.1, 0.2, 1, None, -0.25),
        ParameterRow("norm", norm_second=2.0),
    ),
    ("a",),
    (),
    ("b", "c", "d", "e", "f", "g"),
    ("A remark.",),
)


def test_comparison() -> None:
    assert _printed(COMPARED) == (
        "1: run/delta\n"
        "2: other/delta\n"
        "parameter                   ‖Δ‖ 1  ‖Δ‖ 2  ‖Δ‖/‖W‖ 1  ‖Δ‖/‖W‖ 2  rank 1   cosine\n"
        f"{NAME}    0.5   1234        0.1        0.2       1  -0.2500\n"
        "norm                            –      2          –          –       –        –\n"
        "A remark.\n"
        "\n"
        "answered by     requests  ids\n"
        "both                   6  b, c, d, e, f, …\n"
        "only the first         1  a\n"
    )


def test_comparison_of_models() -> None:
    rows = (ParameterRow(NAME, norm_second=1.0, relative_second=0.5, rank_second=2),)
    [table] = tables(Comparison("base", "edited", rows))
    assert table.columns == ["parameter", ">‖Δ‖", ">‖Δ‖/‖W‖", ">rank"]
    assert table.rows == [(NAME, "1", "0.5", "2")]
    text = _printed(Comparison("base", "copy", (), notes=("All parameters are equal.",)))
    assert text == "1: base\n2: copy\nAll parameters are equal.\n"


def test_comparison_of_memories() -> None:
    entries = (
        EntryRow("a", ("a",), "added", "replaced", 1.5, 2.0, False),
        EntryRow("b", ("b",), "removed"),
    )
    text = _printed(Comparison("one", "two", notes=("A remark.",), entries=entries))
    assert text == (
        "1: one\n"
        "2: two\n"
        "entry  1        2         norm 1  norm 2  same\n"
        "a      added    replaced     1.5       2  no\n"
        "b      removed  –              –       –  –\n"
        "A remark.\n"
    )
    rows = (ParameterRow(NAME, norm_second=1.0),)
    both = (EntryRow("facts", ("a", "b"), second="added", norm_second=2.0),)
    weights, memory = tables(Comparison("base", "edited", rows, notes=("N.",), entries=both))
    assert (weights.title, weights.notes) == ("1: base\n2: edited", ())
    assert (memory.title, memory.notes) == ("", ("N.",))
    assert memory.columns == ["entry", "answers", "change", ">norm"]
    assert memory.rows == [["facts", "a, b", "added", "2"]]


def test_written() -> None:
    done = Written(Path("edited"), "edited model", {"base": "a", "‖Δ‖": 0.123456}, ("A note.",))
    assert _printed(done) == "Wrote the edited model to edited\nbase  a\n‖Δ‖   0.123\nA note.\n"


def test_saved_edits() -> None:
    requests = {f"r{i}": f"prompt {i} → x" for i in range(7)} | {"bare": ""}
    date = "2026-01-02T03:04:05+00:00"
    one = SavedEdit(Path("a/delta"), "ROME", "base", requests, 0.5, ("w",), date)
    bad = SavedEdit(Path("bad"), date="2026-01-02", problem="It is\ndamaged.")
    lines = _printed([one, bad]).splitlines()
    first = "a/delta  ROME    base  1 parameter  0.5  2026-01-02 03:04  r0: prompt 0 → x"
    assert lines[1] == first
    assert lines[6].strip() == "… and 3 more"
    assert lines[7].split() == ["bad", *"––––", "2026-01-02", "It", "is", "↵", "damaged."]
    held = SavedEdit(Path("b"), "GRACE", "base", {}, 2.0, memory="Codebook", entries=("a", "b"))
    assert "b     GRACE   base  2 entries (Codebook)    2" in _printed([held])
    alone = _printed([one]).splitlines()
    assert len(alone) == 1 + 8
    assert alone[-1].strip() == "bare"
    assert _printed([]) == "There are no saved edits here.\n"


def test_offers() -> None:
    offers = [
        Offer("methods", "ROME", "One.", "https://arxiv.org/abs/2202.05262"),
        Offer("methods", "Other", "Two."),
        Offer("data", "ZsRE", "Three."),
    ]
    assert _printed(offers) == (
        "methods\n"
        "ROME   One.  https://arxiv.org/abs/2202.05262\n"
        "Other  Two.\n"
        "\n"
        "data\n"
        "ZsRE  Three.\n"
    )


def test_reports() -> None:
    report = RunReport("ROME", metrics={"locality/kl": MetricRow(0.0, 0.5, 3)})
    assert _printed(Rendered(report, text="a,b\n1,2")) == "a,b\n1,2\n"
    text = _printed(Rendered(report, (Path("run/report.md"),)))
    assert "Locality" in text
    assert text.endswith("Wrote run/report.md\n")


def test_anything_else() -> None:
    with pytest.raises(TypeError, match="There is no table for dict"):
        show({})


@pytest.mark.parametrize("width", [60, 100])
def test_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    edits = [SavedEdit(Path("deep/" * 9), "ROME", "base", {"[red]": "long " * 30}, 0.5, (), "2026")]
    for result in (edits, Written(Path("edited"), "edited model", {"[b]base": "x" * 80})):
        text = _on_terminal(result, monkeypatch, width)
        assert max(map(len, text.splitlines())) <= width
    assert "[b]base" in text
    text = _on_terminal(COMPARED, monkeypatch, 100)
    assert "┃  cosine ┃" in text
    assert "│ -0.2500 │" in text


def test_terminal_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert _on_terminal(COMPARED, monkeypatch, 60) == _printed(COMPARED)
