# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Keeps what a run taught a model: its task vector, to be subtracted, added or swept later."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_edit.callbacks.before_run import BeforeRun
from lightning_edit.callbacks.model_access import find_model
from lightning_edit.callbacks.run_folder import is_dry
from lightning_edit.core.arguments import CheckedArguments

__all__ = ["SaveTaskVector"]


class SaveTaskVector(CheckedArguments, Callback):
    """τ = θ_after − θ_before of a fit, saved as a `WeightDelta` when it ends.

    Of a LoRA run the vector is (alpha/r) B A of each target, as factors. The weights before the
    run lie in memory once more, on the CPU, and in each full checkpoint, so that a resumed run
    saves the vector of the whole run and not only of its last part.

    Args:
        folder: Where the vector goes; an earlier one is replaced.
        model_attribute: Attribute of the LightningModule that holds the model; found by its type
            when null.

    Examples:
        >>> SaveTaskVector("vectors/old").folder
        'vectors/old'

    References:
        Editing Models with Task Arithmetic, arXiv 2212.04089, section 2.
    """

    def __init__(self, folder: str, model_attribute: str | None = None) -> None:
        self.folder = folder
        self.model_attribute = model_attribute
        self._before = BeforeRun(type(self).__name__)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = find_model(pl_module, self.model_attribute)
        if trainer.global_step and not self._before.is_loaded:
            rank_zero_warn(
                f"The run goes on at step {trainer.global_step} from a checkpoint that was written "
                "without SaveTaskVector, so the task vector will be that of the steps to come. "
                "Start from the beginning to have that of the whole run."
            )
        self._before.begin(model)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        base = self._before.weights
        if base is None or is_dry(trainer):
            return
        settings = {"epochs": trainer.current_epoch, "steps": trainer.global_step}
        model = find_model(pl_module, self.model_attribute)
        base.save_task_vector(model, self.folder, settings, trainer.is_global_zero)
        rank_zero_info(f"The task vector of this run is in {self.folder}.")
        self._before.forget()

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]
    ) -> None:
        self._before.save(lambda: find_model(pl_module, self.model_attribute), checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]
    ) -> None:
        self._before.load(checkpoint)
