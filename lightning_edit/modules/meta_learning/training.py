# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""How ``fit`` works for editors with a network that is trained before it edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_edit.core.errors import EditError
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest, check_requests
from lightning_edit.core.sharding import sharing
from lightning_edit.evaluation.evaluator import Baseline, Evaluation, Evaluator
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.fitting import EditState, Fitting, log_metrics, request_rows
from lightning_edit.modules.meta_learning.checkpoints import (
    NETWORK,
    EditorCheckpoint,
    complete_checkpoint,
    editor_record,
)
from lightning_edit.modules.sharded import counts
from lightning_edit.optim import E

__all__ = ["EditorTraining", "Trainable", "ValidationSchedule", "is_ready", "zero_loss"]


@runtime_checkable
class Trainable(Protocol):
    """What training asks of an editor, whose attribute ``network`` is what is trained."""

    def check_ready(self) -> None:
        """Checks that the network can edit.

        Raises:
            EditError: If it was never trained.
        """
        ...

    def edit_loss(
        self, requests: Sequence[EditRequest], processes: Processes | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of edits of some requests.

        Args:
            requests: With rephrases and locality probes.
            processes: Those that train together; None to only look.

        Returns:
            A scalar whose gradient is that of the network, and figures by name; no figures and a
            loss of zero where something was not finite.
        """
        ...

    def network_optimizer(self) -> OptimizerLRScheduler:
        """What steps the network: an optimizer, or all that Lightning accepts in its place."""
        ...

    def trained_for(self) -> list[str]:
        """Names of the parameters that the network belongs to."""
        ...

    def take_editor(self, saved: EditorCheckpoint, where: str, *, any_base: bool) -> None:
        """Takes over a network that was trained before.

        Args:
            saved: What ``read_editor`` has read.
            where: Its name in errors.
            any_base: Edit a model with other weights than those it was trained with.

        Raises:
            ArtifactError: If it is of another method or model.
        """
        ...


class ValidationSchedule(Protocol):
    """Something in training that goes by how edits do in a validation."""

    def update(self, found: Evaluation) -> None:
        """Takes note of how an edit was scored."""
        ...

    def step(self, editor: EditModule[E]) -> None:
        """Acts on it, once all edits of a validation have been scored."""
        ...


class EditorTraining(Fitting[E]):
    """``fit`` trains a network by Lightning's automatic optimization.

    So accumulation, clipping, precision, schedules, checkpoints and loggers are the Trainer's. The
    language model is frozen, and checkpoints hold the network alone. ``validate`` makes edits,
    measures them and takes them out again.

    Args:
        figures: Names of the figures that the editor's ``edit_loss`` gives.
        edits_at_once: Requests that one edit answers when edits are measured; all of a batch if
            None.

    Examples:
        >>> training = EditorTraining(("loss", "edit"))
        >>> training.edit_state()
        {'skipped': 0}
    """

    automatic = True

    def __init__(self, figures: Sequence[str], edits_at_once: int | None = 1) -> None:
        #: Means of the figures over a validation.
        self.losses = nn.ModuleDict({name: MeanMetric() for name in figures})
        self.edits_at_once = edits_at_once
        self.schedule: ValidationSchedule | None = None
        #: Steps that were left out because a loss, a gradient or a factor was not finite.
        self.skipped = 0
        self._usable = 0
        self._baselines: dict[tuple[str, ...], Baseline] = {}

    # -- a step ------------------------------------------------------------------------------

    @override
    def configure_optimizers(self, editor: EditModule[E]) -> OptimizerLRScheduler:
        return _trainable(editor).network_optimizer()

    @override
    def training_step(self, editor: EditModule[E], batch: list[EditRequest]) -> Tensor:
        check_requests(batch)
        loss, figures = _trainable(editor).edit_loss(batch, sharing(editor.model))
        if figures:
            editor.log_dict(dict(figures), prog_bar=True, batch_size=len(batch))
            self._usable += 1
        else:
            self.skipped += 1
        editor.log("skipped", float(self.skipped), batch_size=len(batch))
        return loss

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        usable, self._usable = self._usable, 0
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms = [p.grad.norm() for p in parameters if p.grad is not None]
        if usable and norms and bool(torch.stack(norms).isfinite().all()):
            return
        if usable:
            self.skipped += 1
        for parameter in parameters:  # the step then leaves them, and their moments, alone
            parameter.grad = None

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.skipped:
            rank_zero_warn(
                f"{self.skipped} steps were left out because a loss, a gradient or a factor was "
                "not finite. Lower the learning rate, clip gradients, or load the model with dtype "
                "float32."
            )

    @override
    def finish(self, editor: EditModule[E]) -> None:
        """Nothing: the language model is as it was."""

    # -- measuring ---------------------------------------------------------------------------

    @override
    def validation_step(self, editor: EditModule[E], batch: list[EditRequest]) -> None:
        learner = _trainable(editor)
        if editor.trainer.sanity_checking and not is_ready(learner):
            return
        with torch.inference_mode(False), torch.enable_grad():
            _, figures = learner.edit_loss(batch)
        for name, metric in self.losses.items():
            cast(MeanMetric, metric).update(figures.get(name, float("nan")), len(batch))
        size = self.edits_at_once or len(batch)
        for start in range(0, len(batch), size):
            found = self._measured(editor, batch[start : start + size])
            if counts(editor):
                found.update(editor.val_metrics)
            if self.schedule is not None:
                self.schedule.update(found)

    def _measured(self, editor: EditModule[E], group: list[EditRequest]) -> Evaluation:
        """How an edit does that answers a group of requests."""
        in_fit = editor.trainer.state.fn == "fit"
        evaluator = editor.evaluator
        if in_fit:  # what a model would write takes many passes
            evaluator = Evaluator(editor.model, editor.tokens, readings=["teacher_forced"])
        key = tuple(request.id for request in group)
        if in_fit:  # the model stays the same all along
            baseline = self._baselines.get(key) or evaluator.baseline(group)
            self._baselines[key] = baseline
            edit = editor.session.edit(group, editor.compute_edit, editor.provenance)
            with editor.session.written(edit):
                return evaluator.evaluate(group, baseline)
        before = evaluator.evaluate(group)
        edit = editor.session.edit(group, editor.compute_edit, editor.provenance)
        with editor.session.written(edit):
            after = evaluator.evaluate(group, before.baseline)
        if counts(editor):
            editor.measured.add(group, before, after, request_rows(edit, key))
        return after

    @override
    def log_validation(self, editor: EditModule[E]) -> None:
        if editor.trainer.sanity_checking and not is_ready(_trainable(editor)):
            return
        log_metrics(editor, editor.val_metrics)
        for name, metric in self.losses.items():
            found = cast(MeanMetric, metric)
            editor.log(f"val/{name}", found.compute(), sync_dist=True)  # equal already
            found.reset()
        if self.schedule is not None:
            self.schedule.step(editor)

    # -- checkpoints -------------------------------------------------------------------------

    @override
    def kept(self, editor: EditModule[E], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in state.items() if name.startswith(NETWORK)}

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        editor = cast(EditModule[E], pl_module)
        record = editor_record(editor, _trainable(editor).trained_for())
        checkpoint["lightning_edit"]["editor"] = record

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        editor, saved = cast(EditModule[E], pl_module), cast(EditorCheckpoint, checkpoint)
        if "editor" in saved["lightning_edit"]:
            complete_checkpoint(editor, cast(nn.Module, editor.network), saved, "the checkpoint")

    def edit_state(self) -> EditState:
        """What a resumed training has to know."""
        return {"skipped": self.skipped}

    def load_edit_state(self, state: EditState) -> None:
        """Goes on from what ``edit_state`` returned in an earlier run."""
        self.skipped = int(state["skipped"])


def is_ready(editor: Trainable) -> bool:
    """Whether an editor's network can edit."""
    try:
        editor.check_ready()
    except EditError:
        return False
    return True


def zero_loss(network: nn.Module) -> Tensor:
    """A loss of zero in which every trained parameter has a part, as several processes need it.

    Examples:
        >>> zero_loss(nn.Linear(2, 2)).item() == 0
        True
    """
    parts = [p.sum() for p in network.parameters() if p.requires_grad]
    return 0.0 * torch.stack(parts).sum()


def _trainable(editor: EditModule[E]) -> Trainable:
    if not isinstance(editor, Trainable):
        raise TypeError(
            f"{type(editor).__name__} cannot be trained: it lacks a method of `Trainable`."
        )
    return editor
