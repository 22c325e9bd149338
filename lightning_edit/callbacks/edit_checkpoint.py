# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint after every edit, and the way to go on from it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from lightning_edit.callbacks.run_folder import hold, is_dry
from lightning_edit.core.append_log import AppendLog, appended_to
from lightning_edit.core.arguments import CheckedArguments
from lightning_edit.core.errors import EditError
from lightning_edit.core.files import explained, sync, sync_folder, umask
from lightning_edit.modules.base import EditModule, Journal

__all__ = ["EditCheckpoint"]

FEW_EDITS = 16  # so many are written anew each time
SMALL_LOG = 2**22  # bytes to which a file of appended edits may grow beside a smaller checkpoint


class EditCheckpoint(CheckedArguments, ModelCheckpoint):
    """Keeps ``last.ckpt`` up to date, so that a run goes on at the very edit it was stopped at.

    An editor's checkpoint holds only the edits. When there are many, the next ones are appended to
    ``last.ckpt.edits`` beside it, which is read with it, and both become one file again once that
    has grown as large, and at the end: so a checkpoint costs what is new in it. After an
    interruption it says which edits are safe, and the command that goes on, with the checkpoint's
    own path. A run that begins anew keeps the checkpoint of the run before in ``earlier/``.

    Args:
        dirpath: Folder of the checkpoint; ``checkpoints`` in the run's folder when None.
        every_n_edits: Save after every so many optimizer steps.
    """

    def __init__(self, dirpath: str | None = None, every_n_edits: int = 1) -> None:
        if every_n_edits < 1:
            raise EditError(f"`every_n_edits` is expected to be at least 1, got {every_n_edits}.")
        super().__init__(
            dirpath=dirpath,
            save_last=True,
            save_top_k=0,
            every_n_train_steps=every_n_edits,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every_n_edits = every_n_edits
        self._has_begun = False
        # What is new since the last whole checkpoint, the file that it goes to, and its bound.
        self._journal: Journal[Any] | None = None
        self._log: AppendLog | None = None
        self._largest, self._appends = 0, 0

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        with warnings.catch_warnings():
            # Meant for modules whose step is still to come; an edit's step is over by now.
            message = "Using ModelCheckpoint with manual optimization"
            warnings.filterwarnings("ignore", message=message)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        with warnings.catch_warnings():
            # A logger gives a resumed run a folder of its own; there are no best ones to lose.
            warnings.filterwarnings("ignore", message="The dirpath has changed from")
            super().load_state_dict(state_dict)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_begun = True
        # What a resumed run begins with is in the checkpoint that it read.
        self._last_global_step_saved = trainer.global_step
        if is_dry(trainer) or not trainer.is_global_zero or self.dirpath is None:
            return
        hold(trainer, Path(self.dirpath))
        for left in Path(self.dirpath).glob(f"*{self.FILE_EXTENSION}.part"):  # of a killed run
            _remove(left)
        if trainer.ckpt_path is None:
            _move_aside(Path(self.dirpath))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._appends:
            self._journal = None  # one file in the end
            self._last_global_step_saved = 0
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._journal = self._log = None

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if not self._has_begun:
            return
        # Saving now could keep half a step: the last committed one is on disk already.
        saved = self._last_global_step_saved
        if not saved:
            rank_zero_info("Stopped before the first edit was saved; the model is as it was.")
            return
        last = self.last_model_path or trainer.ckpt_path
        rank_zero_info(
            f"Stopped after {saved} committed step(s), which are safe in {last}. "
            f"Go on with: {_resume_command(str(last))}"
        )

    @override
    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if self._has_room(trainer):
            self._append(trainer, Path(filepath))
        else:
            self._save_whole(trainer, Path(filepath))
            self._begin_log(trainer, Path(filepath))
        self._last_checkpoint_saved = filepath
        trainer.strategy.barrier("EditCheckpoint")

    def _has_room(self, trainer: Trainer) -> bool:
        """Whether the next edits are to be appended, which all processes answer alike."""
        journal, log = self._journal, self._log
        has = journal is not None and journal.is_complete and log is not None
        is_small = log is not None and log.size < self._largest
        return trainer.strategy.broadcast(has and is_small)

    def _begin_log(self, trainer: Trainer, file: Path) -> None:
        """Has the next edits appended to what was just saved, if there are many in it."""
        self._journal = self._log = None
        self._appends = 0
        if trainer.is_global_zero:
            appended_to(file).unlink(missing_ok=True)  # belongs to what was there before
        editor = trainer.lightning_module
        if not isinstance(editor, EditModule) or trainer.global_step < FEW_EDITS:
            return
        self._journal = None if self.save_weights_only else editor.journal()
        if self._journal is not None and self._journal.owner and file.is_file():
            self._log = AppendLog(appended_to(file), self._journal.owner)
            self._largest = max(SMALL_LOG, file.stat().st_size)

    def _append(self, trainer: Trainer, file: Path) -> None:
        """Adds what is new to what was saved before."""
        part = file.with_name(f"{file.name}.part")
        journal, log = cast("Journal[Any]", self._journal), self._log
        with explained(file), journal.alone():
            super()._save_checkpoint(trainer, str(part))
            if log is not None and trainer.is_global_zero:
                log.append(part.read_bytes())
                part.unlink()
        journal.begin()
        self._appends += 1

    def _save_whole(self, trainer: Trainer, file: Path) -> None:
        filepath = str(file)
        # Lightning writes to a temporary folder and moves the file here, which between two file
        # systems is a copy: a run killed meanwhile would lose the earlier checkpoint, too.
        part = Path(f"{filepath}.part")
        own = {self._last_checkpoint_saved, str(trainer.ckpt_path)}
        with explained(file):
            super()._save_checkpoint(trainer, str(part))
            if trainer.is_global_zero and part.exists():
                if part.is_file():
                    part.chmod(0o666 & ~umask())  # fsspec makes it private
                sync(part)
        if trainer.is_global_zero:
            if file.is_dir():  # of a sharded strategy
                if filepath in own:
                    shutil.rmtree(file)
                else:  # not this run's to delete
                    _move_aside(file.parent)
            os.replace(part, file)
            sync_folder(file.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _move_aside(folder: Path) -> None:
    """Keeps an earlier run's checkpoint, which may be all that an interrupted run has left."""
    last = folder / f"{EditCheckpoint.CHECKPOINT_NAME_LAST}{EditCheckpoint.FILE_EXTENSION}"
    if not last.exists():
        return
    stamp = f"{datetime.fromtimestamp(last.stat().st_mtime, UTC):%Y%m%d-%H%M%S-%f}"
    (folder / "earlier").mkdir(exist_ok=True)
    kept = folder / "earlier" / f"{stamp}{last.suffix}"
    if appended_to(last).exists():
        os.replace(appended_to(last), appended_to(kept))
    os.replace(last, kept)


def _resume_command(checkpoint: str) -> str:
    """The command, or the call, that goes on from a checkpoint, wherever it is given."""
    checkpoint = os.path.abspath(checkpoint)
    program = Path(sys.argv[0])
    if program.stem != "lightning-edit" and program.parent.name != "lightning_edit":
        return f"trainer.fit(..., ckpt_path={checkpoint!r})"
    words = list(sys.argv[1:])
    for i, word in reversed(list(enumerate(words))):
        if word == "--ckpt_path":
            del words[i : i + 2]
        elif word.startswith("--ckpt_path="):
            del words[i]
    words += ["--ckpt_path", checkpoint]
    # Configurations may name paths, too, which are relative to this folder.
    return f"cd {shlex.quote(os.getcwd())} && lightning-edit {shlex.join(words)}"
