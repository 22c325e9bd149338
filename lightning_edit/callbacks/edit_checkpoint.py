# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint after every edit, and the way to go on from it."""

from __future__ import annotations

import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

__all__ = ["EditCheckpoint"]


class EditCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt`` up to date, so that a run goes on at the very edit it was stopped at.

    An editor's checkpoint holds only what the edits changed. After an interruption it says
    which edits are safe and how to go on: ``--ckpt_path last``.

    Args:
        dirpath: Folder of the checkpoint; ``checkpoints`` in the run's folder when None.
        every_n_edits: Save after every so many optimizer steps.
    """

    def __init__(self, dirpath: str | None = None, every_n_edits: int = 1) -> None:
        super().__init__(
            dirpath=dirpath,
            save_last=True,
            save_top_k=0,
            every_n_train_steps=every_n_edits,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every_n_edits = every_n_edits

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # Meant for modules whose step is still to come; an edit's step is over by now.
            message = "Using ModelCheckpoint with manual optimization"
            warnings.filterwarnings("ignore", message=message)
            super().on_train_batch_end(*args, **kwargs)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # Saving now could keep half a step: the last committed one is on disk already.
        last = Path(self.dirpath or ".") / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        if not last.is_file():
            rank_zero_info("Stopped before the first edit was saved; the model is as it was.")
            return
        command = f" --config {shlex.quote(_config())}" if _config() else ""
        rank_zero_info(
            f"Stopped after {trainer.global_step} committed step(s), which are safe in {last}. "
            f"Go on with: lightning-edit fit{command} --ckpt_path last"
        )


def _config() -> str:
    """The configuration file of the command line, where there is one."""
    for i, argument in enumerate(sys.argv[:-1]):
        if argument in ("-c", "--config"):
            return sys.argv[i + 1]
    return ""
