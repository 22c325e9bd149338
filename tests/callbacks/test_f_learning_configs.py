# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The packaged configurations of F-Learning, run on the tiny model by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_edit.__main__ import main
from lightning_edit.core.delta import WeightDelta
from lightning_edit.data import write_requests
from lightning_edit.demos import tiny_requests, trained_tiny_model
from tests.test_readme import restored_logging

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tiny model in the place of the default one."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = trained_tiny_model()
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    write_requests(tiny_requests(4), Path("edits.yaml"))
    return ["--model.model=model", "--model.cache_dir=cache"]


def _run(name: str, *words: str) -> None:
    with restored_logging():
        assert main(["fit", "--config", f"f_learning/{name}.yaml", *words]) == 0


def _rows() -> dict[str, dict[str, float]]:
    (results,) = Path("runs/f_learning").rglob("results.json")
    metrics: dict[str, dict[str, float]] = json.loads(results.read_text())["metrics"]
    return metrics


@pytest.mark.parametrize("kind", ["FullTuning", "LoRATuning"])
def test_one_fit(tiny: list[str], kind: str) -> None:
    new = ["--data.new=EditDataModule", "--data.new.path=edits.yaml", "--trainer.max_epochs=12"]
    lr = "1e-3" if kind == "FullTuning" else "2e-2"
    _run("one_fit", f"--model={kind}", f"--model.lr={lr}", *tiny, *new)
    rows = _rows()
    assert rows["reliability/teacher_forced"]["before"] < 0.5
    assert rows["reliability/teacher_forced"]["after"] == 1.0


def test_two_fits(tiny: list[str]) -> None:
    new = ["--data.new=EditDataModule", "--data.new.path=edits.yaml"]
    _run("forget", *tiny, *new)
    vector = WeightDelta.load("runs/f_learning/task_vector")
    assert {name.split(".")[-2] for name in vector.changes} == {"q_proj", "v_proj"}
    data = ["--data=EditDataModule", "--data.path=edits.yaml"]
    _run("learn", "--model.lr=1e-3", "--trainer.max_epochs=10", *tiny, *data)
    assert _rows()["reliability/teacher_forced"]["after"] == 1.0
