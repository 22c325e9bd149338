# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The folder that a run leaves: what is in it, and what it never touches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_edit import EditEvaluator, EditReport, FineTune, WeightDelta
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.report import read_report
from tests.callbacks.foreign import data_of, foreign, quiet_trainer
from tests.modules.helpers import bare_trainer

PARTS = {"README.md", "edits.jsonl", "report.html", "report.md", "results.json"}


def edited(folder: Path, n: int = 3, steps: int = 15, **report: Any) -> FineTune:
    model, tokenizer = trained_tiny_model()
    editor = FineTune.from_model(model, tokenizer, layers=[1], steps=steps, lr=0.01)
    trainer = bare_trainer(
        max_epochs=1,
        callbacks=[EditEvaluator(), EditReport(**report)],
        default_root_dir=folder,
    )
    trainer.fit(editor, datamodule=EditDataModule(requests=tiny_requests(n)))
    return editor


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_editing_run_is_told_whole(tmp_path: Path) -> None:
    editor = edited(tmp_path)
    assert names(tmp_path) == {*PARTS, "delta"}
    results = json.loads((tmp_path / "results.json").read_text())
    data = EditDataModule(requests=tiny_requests(3))
    assert results["method"] == "FineTune"
    assert results["paper"] == FineTune.paper
    assert results["model"]["sha256"] == weight_hash(trained_tiny_model()[0])
    assert results["requests_sha256"] == data.requests_sha256
    assert results["settings"]["steps"] == 15
    assert set(results["versions"]) >= {"python", "torch", "lightning", "transformers"}
    assert results["seconds"]["total"] >= results["seconds"]["edit"] > 0
    assert results["peak_memory_bytes"] > 2**20
    row = results["metrics"]["reliability/autoregressive"]
    assert (row["before"], row["n"]) == (0.0, 3)
    assert row["after"] > 0
    assert row["ci"][0] <= row["after"] <= row["ci"][1]
    rows = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [request.id for request in tiny_requests(3)]
    assert rows[0]["before_text"] == "Dorin."
    assert rows[2]["after_text"] == "Brune."
    # Its rates are those of its rows.
    hits = [row["after"]["reliability/autoregressive"] for row in rows]
    assert row["after"] == pytest.approx(sum(hits) / len(hits))
    report = read_report(tmp_path)
    assert report.metrics["reliability/autoregressive"].n == 3
    [(name, layer)] = results["layers"].items()
    assert name == "model.layers.1.mlp.down_proj.weight"
    assert layer["relative_norm"] == pytest.approx(editor.relative_norm(), rel=1e-5)
    # The edit that is saved is the edit that was made.
    delta = WeightDelta.load(tmp_path / "delta")
    assert delta.norm() == pytest.approx(layer["norm"])
    delta.revert_(editor.model)
    assert weight_hash(editor.model) == results["model"]["sha256"]


def test_what_is_saved_can_be_chosen(tmp_path: Path) -> None:
    edited(tmp_path / "root", dirpath=str(tmp_path / "a"), originals=False)
    assert not (tmp_path / "root").exists()
    assert not WeightDelta.load(tmp_path / "a" / "delta").originals
    edited(tmp_path, dirpath=str(tmp_path / "b"), save_delta=False)
    assert names(tmp_path / "b") == PARTS
    assert "apply" not in (tmp_path / "b" / "report.md").read_text()


def test_a_foreign_run_has_a_report_without_an_edit(tmp_path: Path) -> None:
    trainer = quiet_trainer(EditEvaluator(), EditReport(str(tmp_path)))
    trainer.fit(foreign(), data_of(n=2))
    assert names(tmp_path) == PARTS
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["method"] == "Foreign"
    assert results["metrics"]["reliability/teacher_forced"]["n"] == 2
    assert len((tmp_path / "edits.jsonl").read_text().splitlines()) == 2


def test_without_an_evaluator_it_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no metrics to report: add EditEvaluator"):
        quiet_trainer(EditReport(str(tmp_path))).fit(foreign(), data_of(n=2))
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == {}


@pytest.mark.parametrize("turn", [("evaluator", "report"), ("report", "evaluator")])
def test_the_order_of_the_callbacks_does_not_matter(tmp_path: Path, turn: tuple[str, str]) -> None:
    callbacks: dict[str, Any] = {"evaluator": EditEvaluator(), "report": EditReport(str(tmp_path))}
    trainer = quiet_trainer(*(callbacks[name] for name in turn))
    trainer.fit(foreign(), data_of(n=2))
    results = json.loads((tmp_path / "results.json").read_text())
    row = results["metrics"]["reliability/teacher_forced"]
    assert row["before"] is not None
    assert row["after"] is not None


@pytest.mark.parametrize("name", ["edits.jsonl", "report.html"])
def test_files_of_no_run_are_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ArtifactError, match=rf"holds {name}, which the report .* would replace"):
        edited(tmp_path, n=1, steps=2)
    assert names(tmp_path) == {name}
    assert (tmp_path / name).read_text() == "mine"


def test_earlier_results_are_kept_and_other_files_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My project\n")
    (tmp_path / "notes.txt").write_text("mine")
    texts = []
    for steps in (2, 3, 4):
        edited(tmp_path, n=1, steps=steps)
        texts.append((tmp_path / "results.json").read_text())
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    assert (tmp_path / "notes.txt").read_text() == "mine"
    earlier = sorted((tmp_path / "earlier").iterdir())
    assert [(folder / "results.json").read_text() for folder in earlier] == texts[:2]
    for folder in earlier:
        assert names(folder) == {*PARTS, "delta"} - {"README.md"}
        WeightDelta.load(folder / "delta")
