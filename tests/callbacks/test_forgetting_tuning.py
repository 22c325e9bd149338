# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The three variants of F-Learning with the package's own tuning modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_edit import (
    FullTuning,
    LoRATuning,
    OldThenNew,
    SaveTaskVector,
    TaskVectorForgetting,
    WeightDelta,
)
from lightning_edit.demos import trained_tiny_model
from lightning_edit.forgetting.subtract import forget_
from lightning_edit.modules.fine_tuning.tuning import TuningModule
from tests.callbacks.foreign import data_of, quiet_trainer, weights_of

# Interrupted runs save with a ModelCheckpoint that their continuations have no use for.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

VARIANTS: dict[str, tuple[type[TuningModule], type[TuningModule]]] = {
    "F-Learning_FT": (FullTuning, FullTuning),
    "F-Learning_LoRA": (LoRATuning, LoRATuning),
    "F-Learning_LoRA-FT": (LoRATuning, FullTuning),
}


def _tuning(kind: type[TuningModule]) -> TuningModule:
    return kind.from_model(*trained_tiny_model(), lr=5e-3 if kind is LoRATuning else 1e-3)


def _same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, type[TuningModule]]:
    """A task vector of the old knowledge, and what learns the new."""
    forgets, learns = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("vectors") / "old"
    trainer = quiet_trainer(SaveTaskVector(str(folder)), max_epochs=2)
    trainer.fit(_tuning(forgets), data_of(old=True))
    return folder, learns


def test_variants(variant: tuple[Path, type[TuningModule]]) -> None:
    folder, learns = variant
    module = _tuning(learns)
    start = weights_of(module.model)
    trainer = quiet_trainer(TaskVectorForgetting(str(folder), rate=0.7), max_epochs=2)
    trainer.fit(module, data_of())
    by_hand = _tuning(learns)
    forget_(by_hand.model, WeightDelta.load(folder), 0.7)
    quiet_trainer(max_epochs=2).fit(by_hand, data_of())
    _same(weights_of(module.model), weights_of(by_hand.model))
    # What is committed holds both, what was forgotten and what was learned.
    edit = module.committed()
    model = trained_tiny_model()[0]
    edit.apply_(model)
    _same(weights_of(model), weights_of(module.model))
    edit.revert_(model)
    _same(weights_of(model), start, 0.0)


def test_variants_resume(
    variant: tuple[Path, type[TuningModule]], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    folder, learns = variant

    def run(*callbacks: Callback, ckpt_path: Path | None = None) -> Any:
        module = _tuning(learns)
        forgetting = TaskVectorForgetting(str(folder), rate=0.7)
        trainer = quiet_trainer(
            forgetting, *callbacks, max_epochs=2, enable_checkpointing=bool(callbacks)
        )
        weights_only = None if ckpt_path is None else True
        trainer.fit(module, data_of(), ckpt_path=ckpt_path, weights_only=weights_only)
        return module

    whole = run(ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1))
    for step in (1, 2, 3):
        with subtests.test(step=step):
            resumed = run(ckpt_path=tmp_path / f"step={step}.ckpt")
            _same(weights_of(whole.model), weights_of(resumed.model))


def test_checkpoints_measure_what_was_trained(
    variant: tuple[Path, type[TuningModule]], tmp_path: Path
) -> None:
    folder, learns = variant
    callback = TaskVectorForgetting(str(folder), rate=0.7)
    module = _tuning(learns)
    trainer = quiet_trainer(callback)
    trainer.fit(module, data_of())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    trained = weights_of(module.model)
    trainer.validate(module, data_of(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    _same(weights_of(module.model), trained)
    again = _tuning(learns)
    trainer = quiet_trainer(TaskVectorForgetting(str(folder), rate=0.7))
    trainer.validate(
        again, data_of(), ckpt_path=tmp_path / "run.ckpt", weights_only=True, verbose=False
    )
    _same(weights_of(again.model), trained)


@pytest.mark.parametrize("kind", [FullTuning, LoRATuning])
def test_first_phase(kind: type[TuningModule], tmp_path: Path) -> None:
    trainer = quiet_trainer(SaveTaskVector(str(tmp_path)))
    trainer.fit(_tuning(kind), data_of(old=True))
    two = _tuning(kind)
    quiet_trainer(TaskVectorForgetting(str(tmp_path), 0.3)).fit(two, data_of())
    one = _tuning(kind)
    trainer = quiet_trainer(
        TaskVectorForgetting(rate=0.3, forget_epochs=1),
        max_epochs=2,
        reload_dataloaders_every_n_epochs=1,
    )
    trainer.fit(one, OldThenNew(data_of(), 1))
    _same(weights_of(one.model), weights_of(two.model))
