# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Every script in examples/ runs as it stands, in seconds, and shows what it promises."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.test_readme import restored_logging

SCRIPTS = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
MAX_LINES = 60

# What a reader of the output must find in it.
SHOWN = {
    "command_line": [
        r"\$ lightning-edit fit .*",
        r"Reliability",
        r"capital-velmora: The capital of Velmora is → Kettleby \(was Dorin\)",
        r"reliability,autoregressive,0\.0,1\.0,",
    ],
    "comparing_editors": [
        r"unedited +0\.0+ +1\.0+ +0\.0+ +0\.0+",
        r"'compare\.csv', 'compare\.html', 'compare\.md', 'compare\.tex'",
        r"cells: 2 of 2 done",
    ],
    "forgetting": [
        r"rate 0: old answers 1\.00, locality 1\.00",
        r"reliability: 0\.00 → ",
    ],
    "live_server": [
        r"status The capital of France is Paris",
        r"meanwhile \[.*\] 8 answers\npush   The capital of France is Rome",
        r"meanwhile \[.*\] 8 answers\nundo   The capital of France is Paris",
    ],
    "foreign_trainer": [
        r"Reliability +│ teacher-forced +│ +0\.278",
        r"Open runs/foreign_trainer/report\.html",
    ],
    "ledger": [
        r"2 edit language-velmora by anna for ticket 7",
        r"The capital of Velmora is Kettleby\. Because of edit 1",
        r"cost: edit 1 is made again: 1 edit\(s\) made again",
        r"The capital of Velmora is +Dorin\.",
        r"People in Velmora speak +Ostrish\.",
        r"every bit as before: True",
        r"rows: 4 wrong: \[\]",
    ],
    "remember_and_forget": [
        r"capital-velmora: The capital of Velmora is → Kettleby",
        r"remembered: \['Kettleby\.', 'Ostrish\.', 'Brune\.'\]",
        r"without language-velmora \['Kettleby\.', 'Velmic\.', 'Brune\.'\]",
        r"as before: True",
        r"weights untouched: True",
    ],
    "train_mend": [
        r"unseen facts, reliability: (0\.[89]|1\.)\d",
        r"model\.layers\.3\.mlp\.down_proj\.weight: rank 1",
        r"before: Dorin\.",
        r"edited: Kettleby\.",
        r"undone: Dorin\.",
    ],
    "save_export_undo": [
        r"base    People in Velmora speak Velmic\.",
        r"edited  People in Velmora speak Ostrish\.",
        r"by peft People in Velmora speak Ostrish\.",
        r"largest difference of their logits: \S+e-0[5-9]",
        r"undone  People in Velmora speak Velmic\.",
        r"every bit as before: True",
    ],
}


# peft asks a model in a way that transformers is about to retire.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_runs(
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if script.stem == "live_server":
        pytest.importorskip("xllamacpp", reason="llama.cpp's server, xllamacpp, is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    with restored_logging():
        runpy.run_path(str(script), run_name="__main__")
    printed = capfd.readouterr().out
    assert printed.strip()
    for pattern in SHOWN.get(script.stem, ()):
        assert re.search(pattern, printed), f"{pattern!r} is not in:\n{printed}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_is_short_and_says_how_to_run_it(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert f"python examples/{script.name}" in text


def test_expectations_are_of_examples_that_exist() -> None:
    assert set(SHOWN) <= {script.stem for script in SCRIPTS}
