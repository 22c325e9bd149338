# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Where the callbacks of a run write, and whether they do."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer

from lightning_edit.core.locking import FolderLock

__all__ = ["hold", "is_dry", "release", "run_folder"]

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


def release(trainer: Trainer) -> None:
    """Lets go of all folders that a run holds."""
    for lock in _HELD.pop(trainer, {}).values():
        lock.release()
