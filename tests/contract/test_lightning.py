# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Everything that Lightning's users add works beside editors, or is refused in words."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_edit import GRACE, EditEvaluator, EditModule, FineTune, FullTuning
from lightning_edit.core.errors import EditError
from lightning_edit.demos import trained_tiny_model
from tests.callbacks.foreign import Foreign, data_of
from tests.contract.enumeration import quick_editor
from tests.modules.helpers import bare_trainer, fingerprint

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
    # An edit is over when its step is: the state after it is the one to keep.
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning"),
]

WATCHED = "edit/reliability/teacher_forced"


@pytest.fixture(params=[FineTune, GRACE, FullTuning], ids=lambda cls: cls.__name__)
def editor(request: pytest.FixtureRequest) -> EditModule[Any]:
    """One that commits edits of weights, one of a memory, and one that Lightning trains."""
    made: EditModule[Any] = quick_editor(request.param)
    return made


def fit(editor: EditModule[Any], **settings: Any) -> Any:
    """Fits, and checks that what is in the model is what the editor says, and can be undone."""
    before = fingerprint(editor.model)
    trainer = bare_trainer(**{"max_epochs": 1, "log_every_n_steps": 1, **settings})
    trainer.fit(editor, data_of())
    assert fingerprint(editor.model) != before
    with editor.committed().reverted(editor.model):
        assert fingerprint(editor.model) == before
    return trainer


def refused(editor: EditModule[Any], why: str, **settings: Any) -> None:
    """Fits in vain: the model is left as it is."""
    before = fingerprint(editor.model)
    with pytest.raises((EditError, MisconfigurationException), match=why):
        bare_trainer(max_epochs=2, **settings).fit(editor, data_of())
    assert fingerprint(editor.model) == before


def test_the_best_checkpoints_by_an_edit_metric(editor: EditModule[Any], tmp_path: Path) -> None:
    keep = ModelCheckpoint(
        tmp_path, monitor=WATCHED, mode="max", save_top_k=2, every_n_train_steps=1
    )
    evaluator = EditEvaluator(every_n_steps=1, readings=["teacher_forced"])
    trainer = fit(editor, callbacks=[evaluator, keep], enable_checkpointing=True)
    assert len(keep.best_k_models) == 2
    values = [point["reliability/teacher_forced"] for point in evaluator.sequence]
    assert float(keep.best_model_score or -1) == pytest.approx(max(values))
    trainer.validate(editor, data_of(), ckpt_path="best", weights_only=True)
    other = quick_editor(type(editor))
    trainer = bare_trainer(max_epochs=1)
    trainer.validate(other, data_of(), ckpt_path=keep.best_model_path, weights_only=True)
    assert fingerprint(other.model) == fingerprint(editor.model)


def test_early_stopping(editor: EditModule[Any]) -> None:
    evaluator = EditEvaluator(every_n_steps=1, readings=["teacher_forced"])
    stop = EarlyStopping(
        WATCHED, mode="max", stopping_threshold=-1.0, check_on_train_epoch_end=True
    )
    trainer = fit(editor, callbacks=[stop, evaluator], max_epochs=5)
    assert trainer.current_epoch == 1
    assert trainer.global_step == 2


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_loggers(editor: EditModule[Any], tmp_path: Path, logger: Any) -> None:
    if logger is TensorBoardLogger and not find_spec("tensorboard"):
        pytest.skip("tensorboard is not installed")
    evaluator = EditEvaluator(every_n_steps=1, readings=["teacher_forced"])
    trainer = fit(editor, logger=logger(tmp_path), callbacks=[evaluator])
    assert any(Path(trainer.log_dir).iterdir())
    if logger is CSVLogger:
        lines = (Path(trainer.log_dir) / "metrics.csv").read_text().splitlines()
        assert WATCHED in lines[0].split(",")


@pytest.mark.parametrize("settings", [{"overfit_batches": 1}, {"fast_dev_run": True}], ids=str)
def test_short_runs(editor: EditModule[Any], settings: dict[str, Any]) -> None:
    assert fit(editor, **settings).global_step == 1


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"accumulate_grad_batches": 2}, "accumulation is not supported for manual"),
        ({"gradient_clip_val": 0.1}, "clipping is not supported for manual"),
    ],
    ids=["accumulation", "clipping"],
)
def test_gradients_of_a_training(
    editor: EditModule[Any], settings: dict[str, Any], why: str
) -> None:
    """A committed edit has no gradient to accumulate or clip."""
    if editor.automatic_optimization:
        fit(editor, **settings)
    else:
        refused(editor, why, **settings)


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averages(editor: EditModule[Any], kind: str) -> None:
    average = (
        StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
        if kind == "swa"
        else EMAWeightAveraging()
    )
    if editor.automatic_optimization:
        fit(editor, callbacks=[average], max_epochs=3)
    else:
        refused(editor, f"{type(average).__name__} averages weights", callbacks=[average])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_true_precisions(editor: EditModule[Any], precision: Any) -> None:
    refused(editor, "Give the editor its `dtype` instead", precision=precision)


class Descending(Foreign):
    """AdamW divides by what float16 rounds to zero."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "bf16-mixed"])
def test_precisions_of_a_foreign_module(precision: Any) -> None:
    module = Descending(*trained_tiny_model())
    evaluator = EditEvaluator(readings=["teacher_forced"])
    bare_trainer(max_epochs=1, precision=precision, callbacks=[evaluator]).fit(module, data_of())
    assert evaluator.rows["reliability/teacher_forced"].n == 4
    kind = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    assert module.net.dtype == kind.get(precision, torch.float32)
