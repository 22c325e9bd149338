# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The retention curve against a sequence edited and asked for by hand, step by step."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_edit import EditCheckpoint, EditEvaluator, EditReport, FineTune, RetentionCurve
from lightning_edit.core.errors import EditError
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.evaluation.evaluator import Baseline, Evaluator
from lightning_edit.evaluation.prose import perplexity, read_prose
from lightning_edit.metrics.reading import Reading
from lightning_edit.report.glossary import METRICS, READINGS, metric_name
from tests.callbacks.foreign import foreign, quiet_trainer
from tests.modules.helpers import bare_trainer, same, snapshot

STEPS = [2, 4, 6, 7]


def editor_of(**settings: Any) -> FineTune:
    # Large steps, so that later edits harm earlier ones.
    settings = {"layers": [2], "steps": 6, "lr": 1e-2, **settings}
    return FineTune.from_model(*trained_tiny_model(), **settings)


def data_of(n: int = 7, **settings: Any) -> EditDataModule:
    sizes: dict[str, Any] = {"batch_size": 1, "eval_batch_size": 1, **settings}
    return EditDataModule(requests=tiny_requests(n), **sizes)


def curve_of(folder: Path, **settings: Any) -> RetentionCurve:
    return RetentionCurve(dirpath=str(folder), **{"every_n_edits": 2, **settings})


def fit(folder: Path, curve: RetentionCurve, **trainer: Any) -> FineTune:
    editor = editor_of()
    made = bare_trainer(max_epochs=1, callbacks=[curve], default_root_dir=folder, **trainer)
    made.fit(editor, datamodule=data_of())
    return editor


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RetentionCurve]:
    """The folder and the curve of a fit."""
    folder = tmp_path_factory.mktemp("fitted")
    curve = curve_of(folder, threshold=0.5, max_perplexity_rise=1e6)
    fit(folder, curve)
    return folder, curve


def by_hand() -> tuple[list[list[bool]], list[float]]:
    """Rows of hits and perplexities of the same sequence, and the unedited perplexity first."""
    editor = editor_of()
    requests = tiny_requests(7)
    prose = read_prose()
    costs = [perplexity(editor.model, editor.tokens, prose)]
    rows = []
    for count, request in enumerate(requests, 1):
        editor.edit_optimizer.stage(editor.edit(request))
        editor.edit_optimizer.step()
        if count in STEPS:
            evaluator = Evaluator(editor.model, editor.tokens, readings=["teacher_forced"])
            found = evaluator.evaluate(requests[:count], Baseline({})).probes
            rows.append([bool(p.exact) for p in found if p.metric == "reliability"])
            costs.append(perplexity(editor.model, editor.tokens, prose))
    return rows, costs


def test_the_matrix_is_that_of_the_sequence_made_by_hand(
    fitted: tuple[Path, RetentionCurve],
) -> None:
    curve = fitted[1]
    rows, costs = by_hand()
    assert curve.steps == STEPS
    assert curve.held == rows
    assert any(not hit for row in rows for hit in row)  # something was forgotten
    assert any(hit for hit in rows[-1])
    assert [curve.perplexity_before, *curve.perplexity] == pytest.approx(costs)
    assert costs[-1] != pytest.approx(costs[0], rel=1e-3)
    for row, step, full in zip(rows, STEPS, curve.retention.tolist(), strict=True):
        assert full[:step] == [float(hit) for hit in row]
        assert all(math.isnan(value) for value in full[step:])


def test_the_file_holds_the_figures(
    fitted: tuple[Path, RetentionCurve], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, curve = fitted
    found = json.loads((folder / "retention.json").read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(curve.summary()))
    assert found["requests"] == [request.id for request in tiny_requests(7)]
    assert found["steps"] == STEPS
    assert found["held"] == [[int(hit) for hit in row] for row in curve.held]
    average = [sum(row) / len(row) for row in curve.held]
    assert found["average_retention"] == pytest.approx(average)
    newest = sum(row[-1] for row in curve.held) / len(STEPS)
    assert found["retention_by_age"][0] == pytest.approx(newest)
    assert len(found["retention_by_age"]) == 7
    enough = [step for step, share in zip(STEPS, average, strict=True) if share >= 0.5]
    assert found["edits_held"] == max(enough, default=0)
    assert found["perplexity"] == pytest.approx(curve.perplexity)
    # No number of edits is held at a cost that is too high.
    monkeypatch.setattr(curve, "max_perplexity_rise", -1.0)
    assert curve.summary()["edits_held"] == 0


def test_the_sequential_test_gives_the_same_curve_and_the_model_back(
    fitted: tuple[Path, RetentionCurve], tmp_path: Path
) -> None:
    tested = curve_of(tmp_path / "test", threshold=0.5, max_perplexity_rise=1e6)
    editor = editor_of(test_protocol="sequential")
    kept = snapshot(editor.model)
    trainer = bare_trainer(callbacks=[tested], default_root_dir=tmp_path)
    [found] = trainer.test(editor, datamodule=data_of(), verbose=False)
    assert same(editor.model, kept)
    assert tested.summary() == fitted[1].summary()
    assert found["test/retention/held"] == pytest.approx(sum(tested.held[-1]) / 7)
    assert found["test/retention/perplexity"] == pytest.approx(tested.perplexity[-1])
    assert (tmp_path / "test" / "retention.json").is_file()


@pytest.mark.parametrize("turn", [("report", "curve"), ("curve", "report")])
def test_the_report_draws_the_curve(tmp_path: Path, turn: tuple[str, str]) -> None:
    curve = curve_of(tmp_path)
    callbacks: dict[str, Any] = {"curve": curve, "report": EditReport(str(tmp_path))}
    evaluator = EditEvaluator(every_n_steps=2, readings=["teacher_forced"])
    trainer = bare_trainer(max_epochs=1, callbacks=[evaluator, *(callbacks[name] for name in turn)])
    trainer.fit(editor_of(), datamodule=data_of())
    sequence = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["sequence"]
    places = [point["edits"] for point in sequence]
    assert places == sorted(set(places))
    points = [point for point in sequence if "perplexity_ratio" in point]
    assert [point["edits"] for point in points] == STEPS
    for point, held, cost in zip(points, curve.held, curve.perplexity, strict=True):
        share = point["retention/teacher_forced_strict"]
        assert share == pytest.approx(sum(held) / len(held))
        assert point["perplexity_ratio"] == pytest.approx(cost / curve.perplexity_before)
    assert any("reliability/teacher_forced" in point for point in sequence)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Retention, teacher-forced, all tokens" in page
    assert "Ordinary prose after 7 edits: its perplexity is" in page


def test_every_word_of_the_glossary_is_measured(tmp_path: Path) -> None:
    report = EditReport(str(tmp_path), save_delta=False)
    evaluator = EditEvaluator(readings=get_args(Reading))
    callbacks = [evaluator, curve_of(tmp_path, every_n_edits=1), report]
    trainer = bare_trainer(max_epochs=1, callbacks=callbacks)
    trainer.fit(editor_of(steps=1), datamodule=data_of(n=1))
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    keys = {key for point in results["sequence"] for key in point} | set(results["metrics"])
    found = [metric_name(key) for key in keys - {"edits"}]
    assert {name.metric for name in found} == set(METRICS)
    assert {name.reading for name in found if name.reading} == set(READINGS)


def test_measures_where_a_batch_has_passed_the_number(tmp_path: Path) -> None:
    curve = curve_of(tmp_path, every_n_edits=2)
    trainer = bare_trainer(max_epochs=1, callbacks=[curve])
    trainer.fit(editor_of(), datamodule=data_of(batch_size=3))
    assert curve.steps == [3, 6, 7]


@pytest.mark.parametrize("protocol", ["independent", "batch"])
def test_other_protocols_are_no_sequence(tmp_path: Path, protocol: Any) -> None:
    curve = curve_of(tmp_path)
    trainer = bare_trainer(callbacks=[curve])
    [found] = trainer.test(editor_of(test_protocol=protocol), datamodule=data_of(3), verbose=False)
    assert not curve.steps
    assert not any("retention" in name for name in found)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_goes_on_with_its_curve(tmp_path: Path) -> None:
    def run(folder: Path, ckpt_path: Path | None = None, **settings: Any) -> RetentionCurve:
        curve = curve_of(folder)
        trainer = bare_trainer(
            max_epochs=1,
            enable_checkpointing=True,
            callbacks=[curve, EditCheckpoint(str(folder))],
            **settings,
        )
        trainer.fit(editor_of(), datamodule=data_of(), ckpt_path=ckpt_path)
        return curve

    whole = run(tmp_path / "whole")
    # Stopped between two measurements, but where the end is measured as well.
    run(tmp_path / "parts", max_steps=4)
    resumed = run(tmp_path / "parts", tmp_path / "parts" / "last.ckpt")
    assert resumed.summary() == whole.summary()
    written = (tmp_path / "parts" / "retention.json").read_text(encoding="utf-8")
    assert written == (tmp_path / "whole" / "retention.json").read_text(encoding="utf-8")


def test_a_second_fit_begins_a_curve_of_its_own(tmp_path: Path) -> None:
    curve = curve_of(tmp_path)
    for _ in range(2):
        fit(tmp_path, curve)
        assert curve.steps == STEPS


def test_follows_any_module_and_counts_a_request_once(tmp_path: Path) -> None:
    curve = curve_of(tmp_path, every_n_edits=2)
    module = foreign(lr=3e-3)
    trainer = quiet_trainer(curve, max_epochs=3)
    trainer.fit(module, datamodule=data_of(4, batch_size=2))
    assert curve.steps == [2, 4]
    # The unedited model is the one before the first step.
    model = trained_tiny_model()[0]
    tokens = editor_of().tokens
    assert curve.perplexity_before == pytest.approx(perplexity(model, tokens, read_prose()))
    assert module.net.training  # as it was


def test_logs_by_the_number_of_edits(tmp_path: Path) -> None:
    curve = curve_of(tmp_path)
    logger = CSVLogger(tmp_path, name="log", version="0")
    seen: list[float] = []

    class Watching(RetentionCurve):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            if "retention/held" in trainer.callback_metrics:
                seen.append(float(trainer.callback_metrics["retention/held"]))

    curve = Watching(every_n_edits=2, dirpath=str(tmp_path))
    fit(tmp_path, curve, logger=logger, log_every_n_steps=1)
    logger.save()
    lines = (tmp_path / "log" / "0" / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    logged = [row for row in rows if row["retention/perplexity"]]
    assert [int(row["step"]) for row in logged] == STEPS
    assert [float(row["retention/perplexity"]) for row in logged] == pytest.approx(curve.perplexity)
    shares = [sum(row) / len(row) for row in curve.held]
    assert [float(row["retention/held"]) for row in logged] == pytest.approx(shares)
    assert seen == pytest.approx([shares[i] for i in (0, 0, 1, 1, 2, 2)])


def test_takes_its_own_prose(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("People in Velmora speak Velmic.", encoding="utf-8")
    curve = curve_of(tmp_path, text=str(tmp_path / "own.txt"))
    fit(tmp_path, curve)
    editor = editor_of()
    wanted = perplexity(editor.model, editor.tokens, "People in Velmora speak Velmic.")
    assert curve.perplexity_before == pytest.approx(wanted)
    with pytest.raises(EditError, match="no text file"):
        RetentionCurve(text=str(tmp_path / "missing.txt"))


def test_draws_what_it_measured(fitted: tuple[Path, RetentionCurve]) -> None:
    pytest.importorskip("matplotlib")
    assert (fitted[0] / "retention.png").read_bytes().startswith(b"\x89PNG")


def test_does_without_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, curve_of(tmp_path))
    assert "lightning-edit[plot]" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["retention.json"]


def test_a_broken_model_is_written_down_as_one(tmp_path: Path) -> None:
    curve = curve_of(tmp_path)

    class Breaking(FineTune):
        def compute_edit(self, batch: Any) -> Any:
            edit = super().compute_edit(batch)
            for name in edit.changes:  # of which a later edit of a broken model has none
                # Finite, and more than a pass can hold.
                edit = edit * (1.0 / float(edit.dense(name).abs().max())) * 3e38
            return edit

    editor = Breaking.from_model(*trained_tiny_model(), layers=[2], steps=1)
    trainer = bare_trainer(max_epochs=1, callbacks=[curve])
    trainer.fit(editor, datamodule=data_of(2))
    found = json.loads((tmp_path / "retention.json").read_text(encoding="utf-8"))
    assert found["perplexity"] == [None]
    assert found["edits_held"] == 0


def test_stands_beside_the_evaluator(tmp_path: Path) -> None:
    curve, evaluator = curve_of(tmp_path), EditEvaluator(readings=["teacher_forced"])
    trainer = bare_trainer(max_epochs=1, callbacks=[evaluator, curve])
    trainer.fit(editor_of(), datamodule=data_of())
    after = evaluator.rows["reliability/teacher_forced_strict"].after
    assert after == pytest.approx(sum(curve.held[-1]) / 7)


def test_says_what_it_cannot_follow(tmp_path: Path) -> None:
    curve = curve_of(tmp_path)
    module = foreign()
    trainer = quiet_trainer(curve)
    with pytest.raises(EditError, match=r"a batch holds Tensor\. Train Foreign on batches"):
        curve._add(trainer, module, torch.ones(2))
    del module.tokenizer
    with pytest.raises(EditError, match="RetentionCurve needs the tokenizer of Foreign"):
        curve.on_train_start(trainer, module)
    assert isinstance(module, nn.Module)
    with pytest.raises(ValueError, match="`every_n_edits` is expected to be at least 1"):
        RetentionCurve(every_n_edits=0)
