# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Folders: what is replaced, who may write, what a killed process leaves, and who may read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_edit import EditDataModule, EditReport, FineTune, WeightDelta
from lightning_edit.artifacts.folders import MANIFEST, check_output, list_files, save_model
from lightning_edit.callbacks import EditCheckpoint
from lightning_edit.core.change import LowRank
from lightning_edit.core.errors import ArtifactError, LockedError, StorageError
from lightning_edit.core.files import atomic_folder, clean_up, replacing
from lightning_edit.core.locking import LOCK, FolderLock
from lightning_edit.demos import tiny_model, tiny_requests, trained_tiny_model
from tests.modules.helpers import bare_trainer, same, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:EditReport has no metrics:UserWarning")


def _delta() -> WeightDelta:
    return WeightDelta({"a": LowRank(torch.ones(4, 1), torch.ones(3, 1))})


# -- what is replaced ------------------------------------------------------------------------


def test_a_model_of_ones_own_is_never_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    tiny_model().save_pretrained(mine)
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    with pytest.raises(ArtifactError, match=r"not written here, .* \(`lightning_edit.json`\)"):
        check_output(mine, force=True)
    (mine / MANIFEST).write_text(json.dumps({"format_version": 1, "files": "all"}))
    with pytest.raises(ArtifactError, match=r"would delete it: lightning_edit\.json"):
        check_output(mine, force=True)
    (mine / MANIFEST).unlink()
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before


def test_a_file_that_was_changed_since_is_not_ours_any_more(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    save_model(model, tmp_path / "copy", source=str(tmp_path / "base"))
    check_output(tmp_path / "copy", force=True)
    trained = tiny_model()
    torch.nn.init.zeros_(trained.model.norm.weight)
    trained.save_pretrained(tmp_path / "copy")
    with pytest.raises(ArtifactError, match="holds neither a model nor"):
        check_output(tmp_path / "copy", force=True)


def test_a_file_with_another_hash_than_the_lists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    list_files(tmp_path)
    check_output(tmp_path, force=True)
    (tmp_path / "thesis.tex").write_text("mine")
    listed = json.loads((tmp_path / MANIFEST).read_text())
    listed["files"].append("thesis.tex")
    listed["sha256"]["thesis.tex"] = "0" * 64
    (tmp_path / MANIFEST).write_text(json.dumps(listed))
    with pytest.raises(ArtifactError, match=r"would delete it: thesis\.tex"):
        check_output(tmp_path, force=True)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_tensors_of_somebody_elses_are_kept(tmp_path: Path) -> None:
    (tmp_path / "delta.safetensors").write_text("mine")
    with pytest.raises(ArtifactError, match="may be somebody else's"):
        _delta().save(tmp_path)
    (tmp_path / "delta_config.json").write_text('{"learning_rate": 1}')
    with pytest.raises(ArtifactError, match="may be somebody else's"):
        _delta().save(tmp_path)
    assert (tmp_path / "delta.safetensors").read_text() == "mine"


# -- who may write ---------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from lightning_edit.core.locking import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=rf"in use by process {holder.pid} on \S+ since 20"):
            FolderLock(tmp_path)
        holder.kill()
        holder.wait()
    assert (tmp_path / LOCK).exists()  # what a killed process leaves
    lock = FolderLock(tmp_path)
    lock.release()
    lock.release()
    assert not (tmp_path / LOCK).exists()


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    model, tokenizer = trained_tiny_model()
    before = snapshot(model)
    editor = FineTune.from_model(model, tokenizer, layers=[2], steps=2)
    data = EditDataModule(requests=tiny_requests(1))
    for folder in (tmp_path, tmp_path / "checkpoints"):
        lock = FolderLock(folder)
        callbacks = [
            EditReport(dirpath=str(tmp_path)),
            EditCheckpoint(dirpath=str(tmp_path / "checkpoints")),
        ]
        trainer = bare_trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=1)
        with pytest.raises(LockedError, match=f"in use by process {os.getpid()}"):
            trainer.fit(editor, data)
        assert same(model, before)
        lock.release()
    trainer = bare_trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=1)
    trainer.fit(editor, data)
    assert not list(tmp_path.rglob(LOCK))
    assert (tmp_path / "results.json").exists()


# -- what a killed process leaves, and who may read ------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from lightning_edit.core import files
place, when = Path(sys.argv[1]), int(sys.argv[2])
calls, replace = 0, os.replace
def counted(*names):
    global calls
    if calls == when:
        os._exit(9)
    calls += 1
    replace(*names)
os.replace = counted
with files.atomic_folder(place / "delta", lambda _: None) as staging:
    (staging / "file").write_text("later")
with files.replacing(place / "one.json") as part:
    part.write_text("later")
"""


def test_what_killed_processes_left_is_cleaned_up(tmp_path: Path) -> None:
    for when in range(4):
        place = tmp_path / str(when)
        with atomic_folder(place / "delta", lambda _: None) as staging:
            (staging / "file").write_text("earlier")
        with replacing(place / "one.json") as part:
            part.write_text("earlier")
        words = [sys.executable, "-c", KILLED, str(place), str(when)]
        assert subprocess.run(words, check=False).returncode == (9 if when < 3 else 0)
        clean_up(place / "delta")
        clean_up(place / "one.json")
        assert sorted(path.name for path in place.iterdir()) == ["delta", "one.json"]
        assert (place / "delta" / "file").read_text() in ("earlier", "later")
        # Those of a process that is alive stay.
        with replacing(place / "one.json") as part:
            part.write_text("now")
            clean_up(place / "one.json")
            assert part.exists()


def test_new_files_are_as_readable_as_others(tmp_path: Path) -> None:
    model, tokenizer = trained_tiny_model()
    kept = os.umask(0o022)
    try:
        editor = FineTune.from_model(model, tokenizer, layers=[2], steps=2)
        checkpoints = EditCheckpoint(dirpath=str(tmp_path))
        trainer = bare_trainer(callbacks=[checkpoints], enable_checkpointing=True, max_epochs=1)
        trainer.fit(editor, EditDataModule(requests=tiny_requests(1)))
        _delta().save(tmp_path / "delta")
        os.umask(0o077)
        _delta().save(tmp_path / "private")
    finally:
        os.umask(kept)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"last.ckpt": 0o644, "delta": 0o755, "private": 0o700}
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "delta").iterdir()} == {0o644}


def test_a_full_disk_is_told_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _delta().save(tmp_path / "delta")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot be written: No space left on device\. What"):
        (2 * _delta()).save(folder)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]
    shutil.rmtree(folder)
