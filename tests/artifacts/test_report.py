# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The report of a run is written again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_edit.artifacts import report
from lightning_edit.core.errors import ArtifactError
from lightning_edit.report import read_report
from tests.artifacts.helpers import made_run


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("fmt", "files"),
    [
        ("html", {"report.html"}),
        ("md", {"report.md"}),
        ("json", {"results.json", "edits.jsonl"}),
        ("all", {"report.html", "report.md", "results.json", "edits.jsonl", "README.md"}),
        ("latex", set()),
        ("csv", set()),
    ],
)
def test_report(fmt: Any, files: set[str]) -> None:
    made_run()
    before = {path.name: path.read_text() for path in Path("run").iterdir() if path.is_file()}
    for name in ("report.html", "report.md", "README.md"):
        Path("run", name).write_text("library_name: lightning_edit, worn out")
    done = report("run", fmt)
    assert {path.name for path in done.files} == files
    assert bool(done.text) == (not files)
    for path in Path("run").iterdir():
        if path.is_file():
            kept = path.name in ("results.json", "edits.jsonl")
            assert (path.read_text() == before[path.name]) == (path.name in files or kept)
    assert done.report == read_report("run")


def test_a_report_keeps_a_readme_of_ones_own() -> None:
    made_run()
    Path("run/README.md").write_text("# My project\n")
    assert Path("run/README.md") not in report("run").files
    assert Path("run/README.md").read_text() == "# My project\n"


def test_report_as_text() -> None:
    made_run()
    assert "reliability,teacher_forced,0.0,1.0,0.2,1.0,1" in report("run", "csv").text
    assert r"\begin{tabular}" in report("run", "latex").text
    with pytest.raises(ArtifactError, match="holds no report"):
        report("run/delta")
