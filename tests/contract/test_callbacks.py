# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What every callback keeps to, found by enumeration."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_edit import EditEvaluator, FineTune, FullTuning, SaveTaskVector
from lightning_edit.core.errors import EditError
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests
from tests.callbacks.foreign import data_of, fit, foreign, weights_of
from tests.contract.enumeration import (
    CALLBACKS,
    arguments_of,
    documented_arguments,
    quick_editor,
)
from tests.modules.helpers import bare_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*dirpath.*exists and is not empty:UserWarning")

#: Those that take back edits, and say that there are none in what Lightning's loop trains.
REFUSE_LEARNING = {"EditGuard"}


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors") / "old"
    fit(foreign(), data_of(old=True), SaveTaskVector(str(folder)))
    return folder


@pytest.fixture(params=CALLBACKS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(name: str, folder: Path, vector: Path) -> Any:
    """A callback, with the arguments that it cannot do without."""
    given: dict[str, Any] = {
        "folder": str(folder / "vector"),
        "task_vector": str(vector),
        "refresh_rate": 0,
    }
    cls = CALLBACKS[name]
    known = arguments_of(cls)
    return cls(**{key: value for key, value in given.items() if key in known})


def test_is_named_and_documented(name: str) -> None:
    cls = CALLBACKS[name]
    assert not name.endswith("Callback")
    own = {key for key, owner in arguments_of(cls).items() if owner is cls}
    assert own == set(documented_arguments(cls))
    hooks = {key for key, value in vars(Callback).items() if inspect.isfunction(value)}
    assert hooks & set(vars(cls)) or issubclass(cls, ModelCheckpoint)


def test_can_be_sent_to_another_process(name: str, tmp_path: Path, vector: Path) -> None:
    callback = make(name, tmp_path, vector)
    twin = pickle.loads(pickle.dumps(callback))  # noqa: S301 (our own bytes)
    assert type(twin) is type(callback)


@pytest.mark.filterwarnings("ignore:EditReport has no metrics to report:UserWarning")
@pytest.mark.parametrize("kind", ["foreign", "editor"])
def test_works_in_any_fit_and_leaves_a_checkpoint_without_pickles(
    name: str, tmp_path: Path, vector: Path, kind: str
) -> None:
    callback = make(name, tmp_path, vector)
    module = foreign() if kind == "foreign" else quick_editor(FullTuning)
    others = [] if isinstance(callback, ModelCheckpoint) else [keeping(tmp_path)]
    trainer = bare_trainer(
        max_epochs=2,
        enable_checkpointing=True,
        enable_progress_bar=name == "EditProgressBar",
        callbacks=[callback, *others],
        default_root_dir=tmp_path,
    )
    if name in REFUSE_LEARNING:
        with pytest.raises(EditError, match="its steps are no edits"):
            trainer.fit(module, datamodule=data_of())
        return
    trainer.fit(module, datamodule=data_of())
    assert trainer.global_step == 4
    [file] = tmp_path.rglob("last.ckpt")
    saved = torch.load(file, weights_only=True)
    assert saved["global_step"] == 4


def keeping(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "kept", save_last=True, save_top_k=0, every_n_train_steps=1)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_leaves_the_other_verbs_alone(name: str, tmp_path: Path, vector: Path, verb: str) -> None:
    editor = quick_editor(FullTuning)
    before = weights_of(editor.model)
    trainer = bare_trainer(
        callbacks=[make(name, tmp_path, vector)],
        enable_checkpointing=True,
        enable_progress_bar=name == "EditProgressBar",
        limit_val_batches=1.0,
        default_root_dir=tmp_path,
        inference_mode=False,
    )
    getattr(trainer, verb)(editor, datamodule=EditDataModule(requests=tiny_requests(1)))
    assert all(torch.equal(p, before[n]) for n, p in editor.model.named_parameters())
    # Tracing is measuring, which `validate` is for; a report tells what was measured.
    expected = {
        ("CausalTracing", "validate"): {"causal_tracing.json", "causal_tracing.png"},
        ("EditReport", "validate"): {"validate"},
        ("EditReport", "test"): {"test"},
    }
    assert {path.name for path in tmp_path.iterdir()} == expected.get((name, verb), set())


@pytest.mark.filterwarnings("ignore:EditReport has no metrics to report:UserWarning")
def test_a_dry_run_writes_nothing(name: str, tmp_path: Path, vector: Path) -> None:
    trainer = bare_trainer(
        fast_dev_run=True,
        callbacks=[make(name, tmp_path, vector), EditEvaluator()][: 1 + (name == "EditReport")],
        enable_checkpointing=True,
        enable_progress_bar=name == "EditProgressBar",
        default_root_dir=tmp_path,
    )
    module = quick_editor(FineTune) if name in REFUSE_LEARNING else foreign()
    trainer.fit(module, datamodule=data_of())
    assert not list(tmp_path.iterdir())
