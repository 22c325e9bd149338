# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A report lies whole on disk, in the shape that others rely on, and is read back."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_edit.core.errors import ArtifactError
from lightning_edit.report import EditRow, RunReport, read_report, write_results
from tests.report.sample import sample

FILES = {"results.json", "edits.jsonl", "report.md", "report.html", "README.md"}


def _strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_shape_of_results(tmp_path: Path) -> None:
    write_results(sample(), tmp_path)
    results = _strict((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results)[:7] == [
        "metrics", "method", "model", "requests_sha256", "versions", "seconds",
        "peak_memory_bytes",
    ]  # fmt: skip
    assert results["metrics"] == {
        "reliability/teacher_forced": {"before": 0.0, "after": 1.0, "n": 3, "ci": [0.44, 1.0]},
        "reliability/autoregressive": {"before": 0.0, "after": 2 / 3, "n": 3, "ci": [0.21, 0.94]},
        "locality/teacher_forced": {"before": 1.0, "after": 0.9, "n": 4, "ci": [0.5, 0.99]},
        "locality/kl": {"before": 0.0, "after": 0.0312, "n": 4, "ci": None},
        "portability/one_hop/autoregressive": {"before": None, "after": None, "n": 0, "ci": None},
    }
    assert results["method"] == "ROME"
    assert results["model"]["id"] == "acme/tiny"
    assert results["requests_sha256"] == "a" * 64
    assert results["versions"] == {"lightning_edit": "0.1.0", "torch": "2.13.0"}
    assert results["seconds"] == {"total": 12.5, "edit": 0.5}
    assert results["peak_memory_bytes"] == 3221225472
    assert "edits" not in results


def test_some_of_the_files(tmp_path: Path) -> None:
    write_results(sample(), tmp_path, ("report.html", "report.md"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]


def test_a_line_an_edit(tmp_path: Path) -> None:
    write_results(sample(), tmp_path)
    lines = (tmp_path / "edits.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    edits = [_strict(line) for line in lines]
    assert [edit["id"] for edit in edits] == ["a", "b", "c"]
    assert edits[2]["target_new"] == "京都"
    assert edits[0]["probes"][1]["unchanged"] is True


def test_read_back_and_written_again(tmp_path: Path) -> None:
    report = sample()
    write_results(report, tmp_path / "one")
    assert read_report(tmp_path / "one") == report
    write_results(read_report(tmp_path / "one"), tmp_path / "two")
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert {path.name for path in (tmp_path / "two").iterdir()} == FILES


def test_awkward_text_comes_back(tmp_path: Path) -> None:
    text = "line\u2028separator, next\u0085line, nul \x00, half \ud83d, back\\slash"
    report = RunReport(method="FT", edits=(EditRow("a", text, after_text=text),), notes=(text,))
    assert read_report(write_results(report, tmp_path)) == report


def test_results_alone_are_enough(tmp_path: Path) -> None:
    write_results(sample(), tmp_path)
    (tmp_path / "edits.jsonl").unlink()
    assert read_report(tmp_path) == replace(sample(), edits=())


def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(sample(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def crash(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_results(replace(sample(), method="MEMIT"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_results(sample(), tmp_path)
    mode = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in FILES} == {mode}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"`results.json` is missing"):
        read_report(tmp_path)
    write_results(sample(), tmp_path)
    edits = tmp_path / "edits.jsonl"
    edits.write_bytes(edits.read_bytes()[:-30])
    with pytest.raises(ArtifactError, match=r"edits.jsonl, line 3` is damaged"):
        read_report(tmp_path)
    results = tmp_path / "results.json"
    for content, message in (
        (b'{"method": "\xff"}', "is damaged: it is not JSON"),
        (b"[]", "expected an object"),
        (b'{"method": "FT", "format_version": 2}', "newer than 1"),
        (b"{}", "the field `method` is missing"),
    ):
        results.write_bytes(content)
        edits.unlink(missing_ok=True)
        with pytest.raises(ArtifactError, match=message):
            read_report(tmp_path)
