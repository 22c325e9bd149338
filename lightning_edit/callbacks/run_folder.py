# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Where the callbacks of a run write, and whether they do."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer

__all__ = ["is_dry", "run_folder"]


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
