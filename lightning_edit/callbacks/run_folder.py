# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Where the callbacks of a run write, and whether they do."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakKeyDictionary

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_edit.core.locking import FolderLock

__all__ = ["hold", "is_dry", "run_folder"]

# Folders that Trainers of this process hold.
_HELD: WeakKeyDictionary[Trainer, dict[Path, FolderLock]] = WeakKeyDictionary()


def is_dry(trainer: Trainer) -> bool:
    """Whether a run only tries the code (``fast_dev_run``), so that nothing is to be written."""
    return bool(getattr(trainer, "fast_dev_run", False))


def run_folder(trainer: Trainer, dirpath: str | None) -> Path:
    """The folder of a run, to be asked for by every process, since the log folder is broadcast.

    Args:
        trainer: The Trainer that runs.
        dirpath: What the callback was given; None for the Trainer's log or root folder.
    """
    return Path(dirpath or trainer.log_dir or trainer.default_root_dir)


def hold(trainer: Trainer, folder: Path) -> None:
    """Has no other run write into a folder until this one ends; nothing if it has it already.

    Args:
        trainer: The Trainer that runs; its first process takes the lock.
        folder: Made if it is missing.

    Raises:
        LockedError: If another run holds it.
    """
    if not trainer.is_global_zero or is_dry(trainer):
        return
    held = _HELD.setdefault(trainer, {})
    if folder.resolve() not in held:
        held[folder.resolve()] = FolderLock(folder)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, _Release) for callback in callbacks):
        trainer.callbacks = [*callbacks, _Release()]  # type: ignore[attr-defined]


class _Release(Callback):
    """Lets go of all folders that a run holds once it ends, whoever asked for them."""

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release(trainer)

    def _release(self, trainer: Trainer) -> None:
        for lock in _HELD.pop(trainer, {}).values():
            lock.release()
