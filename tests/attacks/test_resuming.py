# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Trainings that are stopped at any place, and stopped again, come to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_edit import (
    EditDataModule,
    FineTune,
    LoRATuning,
    OldThenNew,
    TaskVectorForgetting,
)
from lightning_edit.callbacks import EditCheckpoint
from lightning_edit.core.errors import ArtifactError
from lightning_edit.demos import tiny_requests, trained_tiny_model
from tests.modules.helpers import bare_trainer, same, snapshot


class StopError(Exception):
    """What stops a run."""


class StopAt(Callback):
    """Stops a run before the step after so many."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise StopError


def _run(folder: Path, stop: int | None, forget: int) -> dict[str, torch.Tensor]:
    model, tokenizer = trained_tiny_model()
    editor = LoRATuning.from_model(model, tokenizer, layers=[2], rank=2)
    callbacks: list[Callback] = [StopAt(stop), EditCheckpoint(dirpath=str(folder))]
    data: Any = EditDataModule(requests=tiny_requests(3))
    more: dict[str, Any] = {}
    if forget:
        data, more = OldThenNew(data, forget), {"reload_dataloaders_every_n_epochs": 1}
        forgetting = TaskVectorForgetting(forget_epochs=forget, rate=0.1, old_nll_warning=None)
        callbacks.insert(1, forgetting)
    trainer = bare_trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=3, **more)
    file = folder / "last.ckpt"
    try:
        trainer.fit(editor, data, ckpt_path=file if file.exists() else None, weights_only=True)
    except StopError:
        assert trainer.global_step == stop
    else:
        assert trainer.global_step == 9
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("forget", [0, 1])
def test_a_training_goes_on_to_the_same_bits(forget: int, tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole", None, forget)
    for stops in ((3, 6), (3, 5), (2,)):
        for stop in (*stops, None):
            found = _run(tmp_path / str(stops), stop, forget)
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items()), stops


def test_another_editor_than_that_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    data = EditDataModule(requests=tiny_requests(2))
    editor = FineTune.from_model(*trained_tiny_model(), layers=[2], steps=2)
    checkpoints = EditCheckpoint(dirpath=str(tmp_path))
    bare_trainer(callbacks=[checkpoints], enable_checkpointing=True, max_epochs=1).fit(editor, data)
    others = {
        r"is of FineTune, not of LoRATuning": LoRATuning.from_model(*trained_tiny_model()),
        r"holds edits of .*2.*, but here .*1.* are to be edited": FineTune.from_model(
            *trained_tiny_model(), layers=[1], steps=2
        ),
    }
    for words, other in others.items():
        before = snapshot(other.model)
        with pytest.raises(ArtifactError, match=words):
            bare_trainer(max_epochs=1).fit(
                other, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True
            )
        assert same(other.model, before)
