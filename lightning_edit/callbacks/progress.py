# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A progress bar that counts edits."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import convert_inf
from typing_extensions import override

from lightning_edit.core.arguments import CheckedArguments

__all__ = ["EditProgressBar"]


class EditProgressBar(CheckedArguments, TQDMProgressBar):
    """Lightning's progress bar with an edit as its unit, beside ``p_target`` and ``relative_norm``.

    Args:
        refresh_rate: Draw after every so many batches; never when 0.
        leave: Leave a finished bar on the screen.

    Examples:
        >>> EditProgressBar(refresh_rate=0).is_disabled
        True
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = True) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    @property
    @override
    def train_description(self) -> str:
        return "Measuring"  # shown until the first edit

    @override
    def on_train_start(self, *args: object) -> None:
        super().on_train_start(*args)
        self.train_progress_bar.reset(total=convert_inf(self.total_train_batches))

    @override
    def on_train_epoch_start(self, trainer: Trainer, *args: object) -> None:
        super().on_train_epoch_start(trainer, *args)
        self._begin_editing(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
        # A run that goes on within an epoch does not start that epoch.
        if self.train_progress_bar.desc.startswith(self.train_description):
            self._begin_editing(trainer)

    def _begin_editing(self, trainer: Trainer) -> None:
        passes = trainer.max_epochs
        which = f" {trainer.current_epoch + 1}/{passes}" if passes and passes > 1 else ""
        self.train_progress_bar.set_description(f"Editing{which}")

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {
            name: f"{value:.3g}" if isinstance(value, float) else value
            for name, value in metrics.items()
        }
