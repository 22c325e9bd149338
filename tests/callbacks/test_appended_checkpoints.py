# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints to which edits are appended hold what checkpoints hold that are written anew."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_edit import GRACE, ROME, AlphaEdit, EditCheckpoint, EditDataModule, FineTune
from lightning_edit.callbacks import edit_checkpoint
from lightning_edit.checkpoints import read_checkpoint
from lightning_edit.core.append_log import read_log
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.hashing import nested_hash
from lightning_edit.demos import tiny_requests, trained_tiny_model
from tests.modules.helpers import bare_trainer, fingerprint

COUNT = 6
SETTINGS: dict[Any, dict[str, Any]] = {
    ROME: {"layers": [1], "steps": 2, "context_templates": ["{}"]},
    AlphaEdit: {"layers": [1, 2], "steps": 2, "context_templates": ["{}"]},
    FineTune: {"layers": [2], "steps": 2},
    # Radii grow and are split, so that entries change that were there before.
    GRACE: {"layers": [2], "steps": 2, "radius": 20.0},
}


class Stop(Callback):
    """Stops a run once a step is over and saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("told to")


def run(cls: Any, folder: Path, stop: int | None = None, **fit: Any) -> Any:
    editor = cls.from_model(*trained_tiny_model(), **SETTINGS[cls])
    callbacks: list[Callback] = [EditCheckpoint(str(folder))]
    if stop is not None:
        callbacks.append(Stop(stop))
    trainer = bare_trainer(max_epochs=1, enable_checkpointing=True, callbacks=callbacks)
    data = EditDataModule(requests=tiny_requests(COUNT))
    if stop is None:
        trainer.fit(editor, data, **fit)
    else:
        with pytest.raises(RuntimeError, match="told to"):
            trainer.fit(editor, data, **fit)
    return editor


@pytest.fixture
def from_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits are appended from the second on."""
    monkeypatch.setattr(edit_checkpoint, "FEW_EDITS", 2)


@pytest.mark.usefixtures("from_two")
@pytest.mark.parametrize("cls", list(SETTINGS))
def test_what_was_appended_is_read_and_gone_on_from(
    cls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, anew = tmp_path / "part", tmp_path / "anew"
    run(cls, part, stop=5)
    assert torch.load(part / "last.ckpt", weights_only=True)["global_step"] == 2
    found = read_checkpoint(part / "last.ckpt")
    assert found["global_step"] == 5
    if cls is AlphaEdit:  # of the keys that edit after edit carries, those that are new
        owner = torch.load(part / "last.ckpt", weights_only=True)["lightning_edit"]["sha256"]
        for record in read_log(part / "last.ckpt.edits", owner):
            saved = torch.load(BytesIO(record), weights_only=True)["optimizer_states"][0]
            [one] = saved["increments"]
            assert {n: t.shape[1] for n, t in one["columns"].items()} == {"keys/1": 1, "keys/2": 1}
            assert not one["carried"]
    with monkeypatch.context() as patch:
        patch.setattr(edit_checkpoint, "FEW_EDITS", 1000)
        run(cls, anew, stop=5)
    wanted = read_checkpoint(anew / "last.ckpt")
    for name in ("request_ids", "batches"):
        assert found["optimizer_states"][0][name] == wanted["optimizer_states"][0][name]
    for name in ("history", "context_templates"):
        old, new = (one["lightning_edit"]["edit_state"].get(name, []) for one in (wanted, found))
        assert [_timeless(row) for row in new] == [_timeless(row) for row in old]
    assert nested_hash(found["state_dict"]) == nested_hash(wanted["state_dict"])
    carried = [one["optimizer_states"][0]["carried"] for one in (found, wanted)]
    assert nested_hash(carried[0]) == nested_hash(carried[1])

    whole = run(cls, tmp_path / "whole")
    resumed = run(cls, part, ckpt_path=part / "last.ckpt")
    assert fingerprint(resumed.model) == fingerprint(whole.model)
    assert [row["id"] for row in resumed.history] == [row["id"] for row in whole.history]
    assert [file.name for file in part.iterdir()] == ["last.ckpt"]  # one file in the end

    run(cls, part, stop=4)  # begins anew, and keeps what was there
    assert read_checkpoint(part / "last.ckpt")["global_step"] == 4
    fresh = cls.from_model(*trained_tiny_model(), **SETTINGS[cls])
    callbacks: list[Callback] = [EditCheckpoint(str(part))]
    trainer = bare_trainer(enable_checkpointing=True, callbacks=callbacks, limit_val_batches=1)
    data = EditDataModule(requests=tiny_requests(1))
    trainer.validate(fresh, data, part / "last.ckpt", verbose=False)
    assert len(fresh.delta.provenance.request_ids) == 4


def _timeless(row: Any) -> Any:
    return {k: v for k, v in row.items() if k != "seconds"} if isinstance(row, dict) else row


@pytest.mark.usefixtures("from_two")
def test_an_interrupted_append_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    run(ROME, tmp_path, stop=4)
    last, log = tmp_path / "last.ckpt", tmp_path / "last.ckpt.edits"
    data = log.read_bytes()
    first, second = read_log(log, torch.load(last, weights_only=True)["lightning_edit"]["sha256"])
    end = len(data) - len(second)
    for size in (end - 30, end - 1, end, end + 1, len(data) - 1):
        log.write_bytes(data[:size])
        assert read_checkpoint(last)["global_step"] == 3
    # The file has its size, but what was written last has not come to the disk.
    log.write_bytes(data[: end - 44] + bytes(44 + len(second)))
    assert read_checkpoint(last)["global_step"] == 3
    for at in (40, 50, 32 + 60 + len(first), len(data) - 5):
        log.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ArtifactError, match="damaged"):
            read_checkpoint(last)
    log.write_bytes(data)
    assert read_checkpoint(last)["global_step"] == 4

    whole = run(ROME, tmp_path / "whole")
    assert fingerprint(run(ROME, tmp_path, ckpt_path=last).model) == fingerprint(whole.model)


@pytest.mark.usefixtures("from_two")
def test_what_else_changes_edits_is_written_as_a_whole(tmp_path: Path) -> None:
    class TakeOut(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                pl_module.remove([tiny_requests(1)[0].id])

    editor = ROME.from_model(*trained_tiny_model(), **SETTINGS[ROME])
    callbacks = [TakeOut(), EditCheckpoint(str(tmp_path)), Stop(6)]
    trainer = bare_trainer(max_epochs=1, enable_checkpointing=True, callbacks=callbacks)
    with pytest.raises(RuntimeError, match="told to"):
        trainer.fit(editor, EditDataModule(requests=tiny_requests(7)))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 5
    found = read_checkpoint(tmp_path / "last.ckpt")["optimizer_states"][0]
    assert found["request_ids"] == list(editor.delta.provenance.request_ids)
    assert len(found["request_ids"]) == 5


def test_what_is_appended_does_not_grow_with_what_is_there(tmp_path: Path) -> None:
    editor = ROME.from_model(*trained_tiny_model(), **SETTINGS[ROME])
    checkpoints = EditCheckpoint(str(tmp_path))
    trainer = bare_trainer(
        max_epochs=1, enable_checkpointing=True, callbacks=[checkpoints, Stop(23)]
    )
    with pytest.raises(RuntimeError, match="told to"):
        trainer.fit(editor, EditDataModule(requests=tiny_requests(24)))
    last = tmp_path / "last.ckpt"
    owner = torch.load(last, weights_only=True)["lightning_edit"]["sha256"]
    sizes = [len(record) for record in read_log(tmp_path / "last.ckpt.edits", owner)]
    assert len(sizes) == 23 - 16
    assert max(sizes) < min(sizes) + 2000  # a request's text is longer than another's
