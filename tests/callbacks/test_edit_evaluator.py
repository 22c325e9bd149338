# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Metrics before and after any fit, in any Trainer, and the folder that tells of them."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_edit import (
    EditCheckpoint,
    EditEvaluator,
    EditReport,
    EditRequest,
    FineTune,
    Probe,
)
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import EditError, ModelError, RequestError
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.evaluation.evaluator import Evaluator
from lightning_edit.functional.intervals import wilson_interval
from tests.callbacks.foreign import Foreign, data_of, foreign, quiet_trainer, weights_of
from tests.modules.helpers import bare_trainer


def editor_of() -> FineTune:
    model, tokenizer = trained_tiny_model()
    return FineTune.from_model(model, tokenizer, layers=[2], steps=10, lr=0.05)


def learned(*callbacks: Callback, epochs: int = 25, n: int = 2, **settings: Any) -> Foreign:
    """A foreign module that has learned the new answers by heart."""
    module = foreign(lr=2e-3)
    trainer = quiet_trainer(*callbacks, max_epochs=epochs, **settings)
    trainer.fit(module, data_of(n=n))
    return module


def test_a_foreign_fit_is_measured_before_and_after() -> None:
    evaluator = EditEvaluator()
    module = learned(evaluator)
    rows = evaluator.rows
    for reading in ("teacher_forced_strict", "autoregressive"):
        row = rows[f"reliability/{reading}"]
        assert (row.before, row.after, row.n) == (0.0, 1.0, 2)
        assert row.ci == pytest.approx(wilson_interval(1.0, 2))
        assert rows[f"locality/{reading}"].before == 1.0
    assert rows["locality/kl"].before == pytest.approx(0, abs=1e-6)
    assert (rows["locality/kl"].after or 0.0) > 0.01
    assert rows["locality/kl"].ci is None
    # The same as measuring by hand, against the model as it was.
    tokens = PromptTokenizer(module.tokenizer)
    requests = tiny_requests(2)
    baseline = Evaluator(trained_tiny_model()[0], tokens).baseline(requests)
    by_hand = Evaluator(module.net, tokens).evaluate(requests, baseline)
    assert evaluator.after is not None
    assert evaluator.after.probes == by_hand.probes
    hits = [p.autoregressive for p in by_hand.probes if p.metric == "generality"]
    assert rows["generality/autoregressive"].after == sum(map(bool, hits)) / len(hits)


def test_measuring_changes_neither_the_run_nor_the_modes() -> None:
    seen: list[bool] = []

    class Mode(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            seen.append(pl_module.net.training)

    plain = learned(Mode(), epochs=2)
    measured = learned(EditEvaluator(every_n_steps=1), Mode(), epochs=2)
    assert seen
    assert all(seen)
    assert measured.losses == plain.losses
    for name, parameter in weights_of(plain).items():
        assert torch.equal(parameter, weights_of(measured)[name])


def test_requests_and_readings_can_be_given() -> None:
    request = EditRequest(
        "The capital of Velmora is",
        "Velmora",
        "Kettleby",
        locality=(Probe("The capital of Ostrane is"),),
    )
    evaluator = EditEvaluator(requests=[request], readings=["autoregressive"], max_new_tokens=8)
    learned(evaluator, epochs=1)
    assert set(evaluator.rows) == {"reliability/autoregressive", "locality/autoregressive"}
    assert evaluator.rows["locality/autoregressive"].n == 1
    assert all(math.isfinite(row.after or 0.0) for row in evaluator.rows.values())


def test_the_curve_over_a_sequence_of_edits() -> None:
    evaluator = EditEvaluator(every_n_steps=2, readings=["teacher_forced"])
    data = EditDataModule(requests=tiny_requests(5))
    bare_trainer(max_epochs=1, callbacks=[evaluator]).fit(editor_of(), datamodule=data)
    assert [point["edits"] for point in evaluator.sequence] == [2.0, 4.0]
    assert all("reliability/teacher_forced" in point for point in evaluator.sequence)


def test_a_foreign_run_can_be_watched_by_its_edits(tmp_path: Path) -> None:
    """Loggers, ``ModelCheckpoint`` and ``EarlyStopping`` see what was measured."""
    evaluator = EditEvaluator(every_n_steps=2, readings=["teacher_forced"])
    name = "edit/reliability/teacher_forced"
    keep = ModelCheckpoint(
        tmp_path / "kept", monitor=name, mode="max", save_top_k=2, every_n_train_steps=2
    )
    stop = EarlyStopping(
        name, mode="max", stopping_threshold=0.9, patience=40, check_on_train_epoch_end=True
    )
    logger = CSVLogger(tmp_path / "logs")
    module = foreign(lr=2e-3)
    trainer = quiet_trainer(
        keep,
        stop,
        EditReport(str(tmp_path / "report")),
        evaluator,
        max_epochs=40,
        logger=logger,
        log_every_n_steps=4,
        enable_checkpointing=True,
        accumulate_grad_batches=2,
    )
    trainer.fit(module, data_of(n=8))
    # Four batches, two steps an epoch: a point each.
    epochs = trainer.current_epoch
    assert 2 < epochs < 40
    steps = [point["step"] for point in evaluator.sequence]
    assert steps == [2.0 * i for i in range(1, epochs + 1)]
    assert evaluator.sequence[-1]["reliability/teacher_forced"] > 0.9
    assert stop.stopped_epoch == epochs - 1
    values = [point["reliability/teacher_forced"] for point in evaluator.sequence]
    assert float(keep.best_model_score or 0.0) == pytest.approx(max(values))
    assert len(keep.best_k_models) == 2
    assert float(trainer.callback_metrics[name]) == pytest.approx(values[-1])
    assert name.isascii()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row[name]]
    assert [float(row[name]) for row in logged][: len(values) - 1] == pytest.approx(values[:-1])
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [point["step"] for point in results["sequence"]] == steps
    assert "steps made" in (tmp_path / "report" / "report.html").read_text()


def test_a_second_fit_is_measured_anew() -> None:
    evaluator = EditEvaluator(every_n_steps=1, readings=["teacher_forced"])
    editor = editor_of()
    for n, made in ((2, [1.0, 2.0]), (3, [3.0])):  # what is in the model is not made again
        trainer = bare_trainer(max_epochs=1, callbacks=[evaluator])
        trainer.fit(editor, datamodule=EditDataModule(requests=tiny_requests(n)))
        assert evaluator.rows["reliability/teacher_forced"].n == n
        # An editor knows its unedited weights at any time.
        assert evaluator.rows["reliability/teacher_forced_strict"].before == 0.0
        assert evaluator.rows["locality/teacher_forced_strict"].before == 1.0
        assert [point["edits"] for point in evaluator.sequence] == made


@pytest.mark.parametrize("kind", ["foreign", "editor"])
def test_a_resumed_run_remembers_the_model_as_it_was(tmp_path: Path, kind: str) -> None:
    def run(folder: Path, **settings: Any) -> EditEvaluator:
        ckpt_path = settings.pop("ckpt_path", None)
        evaluator = EditEvaluator(every_n_steps=1, max_new_tokens=6)
        keep = (
            EditCheckpoint(str(folder))
            if kind == "editor"
            else ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
        )
        trainer = bare_trainer(
            max_epochs=1 if kind == "editor" else 3,
            callbacks=[evaluator, keep],
            enable_checkpointing=True,
            **settings,
        )
        module = editor_of() if kind == "editor" else foreign(lr=2e-3)
        trainer.fit(module, datamodule=data_of(n=4), ckpt_path=ckpt_path, weights_only=True)
        return evaluator

    whole = run(tmp_path / "whole")
    run(tmp_path / "part", max_steps=1)
    last = tmp_path / "part" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    assert any("EditEvaluator" in key for key in state["callbacks"])
    resumed = run(tmp_path / "part", ckpt_path=last)
    if kind == "foreign":  # distributions are not kept
        del whole.rows["locality/kl"]
        for point in whole.sequence + resumed.sequence:
            point.pop("locality/kl", None)
    assert resumed.rows == whole.rows
    assert resumed.sequence == whole.sequence
    assert resumed.before is not None
    assert whole.before is not None
    assert resumed.before.probes == whole.before.probes


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning")
def test_what_it_lacks_it_names() -> None:
    twice = [EditRequest("People in Velmora speak", "Velmora", a) for a in ("Ostrish", "Velmic")]
    with pytest.raises(RequestError, match="contradict"):
        EditEvaluator(requests=twice)
    with pytest.raises(EditError, match="EditEvaluator has nothing to ask"):
        quiet_trainer(EditEvaluator()).fit(foreign(), data_of().train_dataloader())
    with pytest.raises(ModelError, match="no such attribute"):
        learned(EditEvaluator(model_attribute="brain"), epochs=1)
    module = foreign()
    del module.tokenizer
    with pytest.raises(EditError, match="needs the tokenizer of Foreign"):
        quiet_trainer(EditEvaluator()).fit(module, data_of())
