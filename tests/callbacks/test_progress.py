# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What the progress bar of edits shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from typing_extensions import override

from lightning_edit import EditDataModule, EditProgressBar, FineTune
from lightning_edit.demos import tiny_requests, trained_tiny_model
from tests.modules.helpers import bare_trainer


class Glance(Callback):
    """Reads the bar where the unedited model is measured, and at the first edit."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def _look(self, trainer: Any) -> None:
        self.seen.append(str(trainer.progress_bar_callback.train_progress_bar))

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer)

    @override
    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self._look(trainer)


@pytest.mark.parametrize("leave", [True, False])
def test_it_says_how_many_edits_there_will_be_while_it_measures(leave: bool) -> None:
    glance = Glance()
    editor = FineTune.from_model(*trained_tiny_model(), layers=[2], steps=1)
    trainer = bare_trainer(
        max_epochs=1, enable_progress_bar=True, callbacks=[EditProgressBar(leave=leave), glance]
    )
    data = EditDataModule(requests=tiny_requests(3), batch_size=1)
    trainer.fit(editor, data)
    measuring, editing = glance.seen[:2]
    assert measuring.startswith("Measuring")
    assert "0/3" in measuring
    assert editing.startswith("Editing")
    assert "0/3" in editing


class Save(Callback):
    """Saves a checkpoint after the first edit."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @override
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if not self.file.exists():
            trainer.save_checkpoint(self.file)


def test_it_says_that_it_edits_where_a_run_goes_on_within_an_epoch(tmp_path: Path) -> None:
    data = EditDataModule(requests=tiny_requests(3), batch_size=1)
    file, glance = tmp_path / "begun.ckpt", Glance()
    bar = {"enable_progress_bar": True, "callbacks": [EditProgressBar(), glance]}
    for settings in ({"callbacks": [Save(file)]}, bar):
        editor = FineTune.from_model(*trained_tiny_model(), layers=[2], steps=1)
        trainer = bare_trainer(max_epochs=1, **settings)
        trainer.fit(editor, data, ckpt_path=file if file.exists() else None)
    measuring, *editing = glance.seen
    assert measuring.startswith("Measuring")
    assert len(editing) == 2
    assert all(seen.startswith("Editing") for seen in editing)
