# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The verb ``compare``: studies from configurations, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_edit.benchmark import progress
from lightning_edit.benchmark.compare import study_of
from lightning_edit.cli.comparison import parser
from lightning_edit.demos import tiny_requests, trained_tiny_model
from tests.runs import ROOT, run_here

STUDIES = sorted((ROOT / "configs" / "benchmark").glob("*.yaml"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    model, tokenizer = trained_tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    requests = [request.to_dict() for request in tiny_requests(2)]
    facts = {"class_path": "EditDataModule", "init_args": {"requests": requests}}
    study = {
        "methods": ["SCR", {"method": "SCR", "settings": {"threshold": 0.9}, "label": "strict"}],
        "data": [{"source": facts, "label": "world"}],
        "protocols": ["independent", {"name": "batch", "size": 2}],
        "model": str(tmp_path / "model"),
        "accelerator": "cpu",
        "max_new_tokens": 3,
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(study))
    return file


def test_cells_are_listed_chosen_and_run(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(progress, "rank_zero_info", told.append)
    words = ["compare", "-c", str(config), "--out", str(tmp_path / "out")]
    assert run_here([*words, "--cells", "method=scr,protocol=batch*"]) == 0
    printed = capsys.readouterr().out
    assert "world, batch of 2: teacher-forced / autoregressive" in printed
    assert "unedited" in printed
    assert "3 of 4 cells are not done." in printed
    # Those that were not asked for are not on the way.
    assert told[0] == "1 of 1  SCR · world · batch of 2 · 0 …"
    assert f"Wrote {tmp_path / 'out' / 'tiny.html'}" in printed
    assert run_here([*words, "--list"]) == 0
    assert "1 done, 0 failed, 3 missing" in capsys.readouterr().out


def test_what_is_wrong_is_said_before_anything_runs(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**study, "methods": ["ROM"]}))
    assert run_here(["compare", "-c", str(config), "--out", str(tmp_path / "out")]) == 1
    assert "no method 'ROM'. Did you mean `ROME`?" in capsys.readouterr().err
    config.write_text(yaml.safe_dump({**study, "methds": ["SCR"]}))
    assert run_here(["compare", "-c", str(config)]) == 2
    assert "Did you mean `methods` instead of `methds`?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_of_the_package_parse_and_name_what_there_is(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    made = parser()
    options = made.instantiate_classes(made.parse_args(["-c", str(path)])).as_dict()
    aside = ("config", "out", "cells", "list")
    study = study_of(**{name: value for name, value in options.items() if name not in aside})
    resolved = study.resolved
    labels = {method.name for method in study.methods}
    assert set(resolved) == labels
    assert "SCR" in labels
    assert any(label.startswith("FT") for label in labels)
