# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The folder that a run leaves: what is in it, and what it never touches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

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


def test_a_foreign_run_is_told_whole_too(tmp_path: Path) -> None:
    module = foreign()
    before = weight_hash(module.net)
    trainer = quiet_trainer(EditEvaluator(), EditReport(str(tmp_path)))
    trainer.fit(module, data_of(n=2))
    assert names(tmp_path) == {*PARTS, "delta"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["method"] == "Foreign"
    assert results["model"]["sha256"] == before
    assert results["metrics"]["reliability/teacher_forced"]["n"] == 2
    assert len((tmp_path / "edits.jsonl").read_text().splitlines()) == 2
    delta = WeightDelta.load(tmp_path / "delta")
    assert delta.provenance.request_ids == tuple(request.id for request in tiny_requests(2))
    delta.revert_(module.net)
    assert weight_hash(module.net) == before


def test_a_resumed_foreign_run_saves_the_change_of_the_whole_run(tmp_path: Path) -> None:
    def run(folder: str, epochs: int, ckpt_path: Path | None = None) -> WeightDelta:
        keep = ModelCheckpoint(tmp_path / folder, save_last=True, save_top_k=0)
        report = EditReport(str(tmp_path / folder))
        trainer = quiet_trainer(
            EditEvaluator(readings=["teacher_forced"]),
            report,
            keep,
            max_epochs=epochs,
            enable_checkpointing=True,
        )
        trainer.fit(foreign(), data_of(n=2), ckpt_path=ckpt_path, weights_only=True)
        return WeightDelta.load(tmp_path / folder / "delta")

    whole = run("whole", 2)
    run("part", 1)
    rest = run("part", 2, tmp_path / "part" / "last.ckpt")
    assert rest.hashes == whole.hashes


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


@pytest.mark.parametrize("protocol", ["independent", "batch", "sequential"])
def test_a_test_is_told_as_a_fit_is(tmp_path: Path, protocol: Any) -> None:
    model, tokenizer = trained_tiny_model()
    settings: dict[str, Any] = {"layers": [1], "steps": 15, "lr": 0.01, "test_protocol": protocol}
    editor = FineTune.from_model(model, tokenizer, **settings)
    before = weight_hash(model)
    trainer = bare_trainer(
        callbacks=[EditReport()], default_root_dir=tmp_path, inference_mode=False
    )
    trainer.test(editor, datamodule=EditDataModule(requests=tiny_requests(2), batch_size=2))
    assert weight_hash(model) == before
    assert names(tmp_path) == {"test"}
    assert names(tmp_path / "test") == PARTS
    results = json.loads((tmp_path / "test" / "results.json").read_text())
    row = results["metrics"]["reliability/autoregressive"]
    assert (row["before"], row["n"]) == (0.0, 2)
    assert row["after"] > 0
    assert row["ci"][0] <= row["after"] <= row["ci"][1]
    logged = float(trainer.callback_metrics["test/reliability/autoregressive"])
    assert row["after"] == pytest.approx(logged)
    rows = [
        json.loads(line) for line in (tmp_path / "test" / "edits.jsonl").read_text().splitlines()
    ]
    assert [row["id"] for row in rows] == [request.id for request in tiny_requests(2)]
    assert rows[0]["before_text"] == "Dorin."
    assert all(row["seconds"] > 0 for row in rows)
    assert results["settings"]["steps"] == 15
    assert results["seconds"]["edit"] == pytest.approx(sum(row["seconds"] for row in rows))


def test_validate_compares_with_the_model_as_it_was(tmp_path: Path) -> None:
    edited_model = edited(tmp_path / "fit", n=2, steps=40).model
    _, tokenizer = trained_tiny_model()

    def validate(name: str, **settings: Any) -> dict[str, Any]:
        editor = FineTune.from_model(edited_model, tokenizer, layers=[1], **settings)
        if name == "memory":
            editor.compare_with(trained_tiny_model()[0])
        trainer = bare_trainer(
            callbacks=[EditReport()], default_root_dir=tmp_path / name, limit_val_batches=1.0
        )
        trainer.validate(editor, datamodule=EditDataModule(requests=tiny_requests(2)))
        assert editor.measured.requests == tiny_requests(2)
        assert not any("unedited" in key for key in editor.state_dict())
        folder = tmp_path / name / "validate"
        assert names(folder) == PARTS
        results: dict[str, Any] = json.loads((folder / "results.json").read_text())
        return results

    base = tmp_path / "base"
    trained_tiny_model()[0].save_pretrained(base)
    itself = validate("itself")
    assert "compared with itself" in itself["notes"][0]
    assert itself["metrics"]["locality/kl"]["after"] == pytest.approx(0, abs=1e-6)
    folder, memory = validate("folder", baseline=str(base)), validate("memory")
    assert not folder["notes"]
    assert folder["metrics"] == memory["metrics"]
    # The same as of the run that made the edit.
    fit = json.loads((tmp_path / "fit" / "results.json").read_text())["metrics"]
    assert fit["locality/kl"]["after"] > 0
    for key, row in fit.items():
        found = folder["metrics"][key]
        assert found["n"] == row["n"]
        for side in ("before", "after"):
            assert found[side] == pytest.approx(row[side], rel=1e-4, abs=1e-6), key
