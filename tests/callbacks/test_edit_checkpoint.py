# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint of an editing run holds, when it is written, and what it refuses."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_edit import EditCheckpoint, FineTune
from lightning_edit.core.errors import ArtifactError, RequestError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, trained_tiny_model
from tests.modules.helpers import bare_trainer


def editor_of(change: float = 0.0) -> FineTune:
    """An editor of the tiny model, of which a weight that is never edited may differ."""
    model, tokenizer = trained_tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] += change
    return FineTune.from_model(model, tokenizer, layers=[2], steps=2)


def data_of(n: int = 5) -> EditDataModule:
    return EditDataModule(requests=tiny_requests(n))


def trainer_of(folder: Path, every_n_edits: int = 1, *callbacks: Callback) -> Trainer:
    checkpoint = EditCheckpoint(str(folder), every_n_edits)
    return bare_trainer(max_epochs=1, enable_checkpointing=True, callbacks=[checkpoint, *callbacks])


def steps_in(file: Path) -> int:
    return int(torch.load(file, weights_only=True)["global_step"])


class Fail(Callback):
    """Raises once a step is over, before checkpoints are written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("told to")


def stop_at(folder: Path, step: int, every_n_edits: int = 1, **fit: Any) -> FineTune:
    editor = editor_of()
    with pytest.raises(RuntimeError, match="told to"):
        trainer_of(folder, every_n_edits, Fail(step)).fit(editor, data_of(), **fit)
    return editor


def test_a_checkpoint_holds_what_changed_and_loads_without_pickles(tmp_path: Path) -> None:
    trainer_of(tmp_path).fit(editor_of(), data_of(2))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not saved["state_dict"]  # the weights follow from the base and the edits
    name = "model.layers.2.mlp.down_proj.weight.dense"
    assert list(saved["optimizer_states"][0]["delta"]) == [name]
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_last_edits_are_saved_whatever_the_interval(tmp_path: Path) -> None:
    trainer_of(tmp_path, 2).fit(editor_of(), data_of(5))
    assert steps_in(tmp_path / "last.ckpt") == 5


@pytest.mark.parametrize(("every_n_edits", "failing", "safe"), [(1, 3, 2), (2, 4, 2), (2, 2, 0)])
def test_only_what_is_on_disk_is_called_safe(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    every_n_edits: int,
    failing: int,
    safe: int,
) -> None:
    monkeypatch.setattr("sys.argv", ["my_script.py", "fit"])
    with caplog.at_level("INFO"):
        stop_at(tmp_path, failing, every_n_edits)
    last = tmp_path / "last.ckpt"
    if safe:
        assert f"Stopped after {safe} committed step(s)" in caplog.text
        assert f"Go on with: trainer.fit(..., ckpt_path={str(last)!r})" in caplog.text
        assert steps_in(last) == safe
    else:
        assert "Stopped before the first edit was saved" in caplog.text
        assert not last.exists()


def test_a_resumed_run_that_fails_at_once_names_the_steps_it_began_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(tmp_path, 3)
    monkeypatch.setattr("sys.argv", ["/usr/bin/lightning-edit", "fit", "-c", "a b.yaml", "-c", "c"])
    with caplog.at_level("INFO"):
        stop_at(tmp_path, 3, ckpt_path=tmp_path / "last.ckpt")
    assert "Stopped after 2 committed step(s)" in caplog.text
    command = f"lightning-edit fit -c 'a b.yaml' -c c --ckpt_path {tmp_path / 'last.ckpt'}"
    assert command in caplog.text


def test_the_printed_command_names_the_checkpoint_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["fit", "--ckpt_path", "x.ckpt", "--ckpt_path=y.ckpt", "--data", "Facts"]
    monkeypatch.setattr("sys.argv", ["/opt/lightning_edit/__main__.py", *words])
    with caplog.at_level("INFO"):
        stop_at(tmp_path, 2)
    command = shlex.join(["fit", "--data", "Facts", "--ckpt_path", str(tmp_path / "last.ckpt")])
    assert f"&& lightning-edit {command}\n" in caplog.text


def test_a_run_that_begins_anew_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    stop_at(tmp_path, 4)
    stop_at(tmp_path, 2)
    assert steps_in(tmp_path / "last.ckpt") == 1
    assert [steps_in(file) for file in (tmp_path / "earlier").iterdir()] == [3]


def test_a_folder_that_this_run_has_not_written_is_kept(tmp_path: Path) -> None:
    stop_at(tmp_path, 3)
    (tmp_path / "last.ckpt").rename(tmp_path / "start.ckpt")
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "thesis.tex").write_text("mine")
    trainer_of(tmp_path).fit(editor_of(), data_of(), ckpt_path=tmp_path / "start.ckpt")
    assert steps_in(tmp_path / "last.ckpt") == 5
    [kept] = (tmp_path / "earlier").iterdir()
    assert (kept / "thesis.tex").read_text() == "mine"


def test_a_run_killed_while_it_saves_keeps_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(tmp_path, 3)

    def half(opened: Any) -> NoReturn:
        """Copies half of the file to its place, as between two file systems, and dies."""
        opened.f.close()
        content = Path(opened.temp).read_bytes()
        Path(opened.path).write_bytes(content[: len(content) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fsspec.implementations.local.LocalFileOpener.commit", half)
        with pytest.raises(SystemExit):
            trainer_of(tmp_path).fit(editor_of(), data_of(), ckpt_path=tmp_path / "last.ckpt")
    assert steps_in(tmp_path / "last.ckpt") == 2
    resumed, whole = editor_of(), editor_of()
    trainer_of(tmp_path).fit(resumed, data_of(), ckpt_path=tmp_path / "last.ckpt")
    trainer_of(tmp_path / "whole").fit(whole, data_of())
    assert weight_hash(resumed.model) == weight_hash(whole.model)
    assert [p.name for p in tmp_path.glob("*.*")] == ["last.ckpt"]


def test_a_checkpoint_of_another_base_is_refused_before_any_weight_changes(tmp_path: Path) -> None:
    stop_at(tmp_path, 3)
    other = editor_of(change=1e-3)
    before = weight_hash(other.model)
    with pytest.raises(ArtifactError, match="belongs to the base weights"):
        trainer_of(tmp_path).fit(other, data_of(), ckpt_path=tmp_path / "last.ckpt")
    assert weight_hash(other.model) == before
    assert not other.delta.changes


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    stop_at(tmp_path, 3)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    del saved["lightning_edit"]
    torch.save(saved, tmp_path / "foreign.ckpt")
    editor = editor_of()
    before = weight_hash(editor.model)
    with pytest.raises(ArtifactError, match="not written by an editor"):
        trainer_of(tmp_path).fit(editor, data_of(), ckpt_path=tmp_path / "foreign.ckpt")
    assert weight_hash(editor.model) == before


def test_a_checkpoint_of_other_requests_is_refused(tmp_path: Path) -> None:
    stop_at(tmp_path, 3)
    with pytest.raises(RequestError, match="requests"):
        trainer_of(tmp_path).fit(editor_of(), data_of(4), ckpt_path=tmp_path / "last.ckpt")
