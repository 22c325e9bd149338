# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""How ``fit`` works for an editor: what a training step does, and what a checkpoint keeps."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypedDict, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override

from lightning_edit.core.committed import RequestBatch
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import EditError, FailedRequestsError, some_of
from lightning_edit.core.figures import RequestFigures, not_taken
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest
from lightning_edit.core.sharding import sharing
from lightning_edit.modules.sharded import check_alike, counts, together
from lightning_edit.optim import E, EditOptimizer

if TYPE_CHECKING:
    from lightning_edit.modules.base import EditModule

__all__ = [
    "CommitEdits",
    "EditState",
    "Fitting",
    "Stateful",
    "edit_again",
    "edit_or_go_on",
    "log_metrics",
    "measure",
    "request_rows",
    "warn_of_not_taken",
]

_AVERAGES = (StochasticWeightAveraging, WeightAveraging)
MAX_IDS = 10  # of edits that did not take; all are in the report and in `history`
# What an editor may be asked for when an edit did not take.
_REMEDIES = {"steps": "more `steps`", "lr": "a higher `lr`", "layers": "other `layers`"}


class EditState(TypedDict, total=False):
    """What a checkpoint keeps of an editor beside the edits, as tensors and primitives.

    A part of an editor gives what it knows, and reads nothing else.
    """

    #: Figures of each committed edit, or of each request that was trained on.
    history: list[RequestFigures]
    #: Requests that were trained on, where the edits do not know them.
    requests: list[dict[str, object]]
    #: Context templates of locate-then-edit methods, in groups.
    context_templates: list[list[str]]
    #: Steps of a training that were left out.
    skipped: int
    #: Whether networks were trained, the hash of what they came to, and how states are pooled.
    is_trained: bool
    weights: str | None
    pooling: str
    #: Block of slots that is being trained.
    block: str


class Stateful(Protocol):
    """A part of an editor with something that a resumed run must have."""

    def edit_state(self) -> EditState:
        """What a checkpoint keeps of it, as tensors and primitives."""
        ...

    def load_edit_state(self, state: EditState) -> None:
        """Takes over what ``edit_state`` returned in an earlier run."""
        ...


class Fitting(Callback, ABC, Generic[E]):
    """How ``fit`` works for an editor.

    It is a Lightning callback whose hooks the editor itself calls, so that it can be asked at
    every point of a run without being in the Trainer's list.
    """

    #: Whether Lightning steps the optimizer by itself.
    automatic: bool
    #: What it trained on, by id; nothing where the edits themselves know what they were made of.
    requests: Mapping[str, EditRequest] = MappingProxyType({})

    def check_repeats(self, editor: EditModule[E]) -> None:
        """Checks that an editor which is to repeat requests commits edits.

        Raises:
            EditError: If it does not.
        """
        if editor.repeat_requests and not isinstance(self, CommitEdits):
            raise EditError(
                f"{type(editor).__name__} has no use for `repeat_requests`: it is trained in "
                "epochs, each of which sees every request. Leave it out."
            )

    def check_commits(self, editor: EditModule[E]) -> None:
        """Checks that ``fit`` commits edits, rather than train the editor or its model.

        Raises:
            EditError: If it does not.
        """
        if not isinstance(self, CommitEdits):
            raise EditError(
                f"{type(editor).__name__} does not commit edits: `Trainer.fit` trains it. Write "
                "this one into the model with `edit.apply_(model)`."
            )

    @abstractmethod
    def configure_optimizers(self, editor: EditModule[E]) -> OptimizerLRScheduler:
        """What Lightning is to step: an optimizer, or all that it accepts in place of one."""

    @abstractmethod
    def training_step(self, editor: EditModule[E], batch: list[EditRequest]) -> Tensor | None:
        """One step; the loss where Lightning steps the optimizer."""

    @abstractmethod
    def validation_step(self, editor: EditModule[E], batch: list[EditRequest]) -> None:
        """Measures a batch."""

    @abstractmethod
    def log_validation(self, editor: EditModule[E]) -> None:
        """Logs what was measured, once all batches have been."""

    @abstractmethod
    def kept(self, editor: EditModule[E], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint keeps of the editor's state."""

    @abstractmethod
    def finish(self, editor: EditModule[E]) -> None:
        """Has ``history`` hold what the edited model makes of each request.

        Called after the last step, once or several times, by all processes.
        """


class CommitEdits(Fitting[E]):
    """``fit`` commits edits: one optimizer step a batch of requests.

    A request that is in the model, by its id and its text, is not made again unless the editor's
    ``repeat_requests`` says so; an epoch after which no request is left is the last.
    """

    automatic = False

    def __init__(self) -> None:
        self._has_committed = False
        #: Figures of the requests of this ``fit``.
        self._rows: list[RequestFigures] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Callback] = getattr(trainer, "callbacks", [])
        averages = [c for c in callbacks if isinstance(c, _AVERAGES)]
        if stage == "fit" and averages:
            raise EditError(
                f"{type(averages[0]).__name__} averages weights over steps, which would leave a "
                f"part of each edit of {type(pl_module).__name__}: an edit is in the model or it "
                "is not. Leave the callback out."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows = []

    @override
    def configure_optimizers(self, editor: EditModule[E]) -> OptimizerLRScheduler:
        return editor.edit_optimizer

    @override
    def training_step(self, editor: EditModule[E], batch: list[EditRequest]) -> None:
        began = time.perf_counter()
        if not editor.repeat_requests:
            batch = editor.session.unanswered(batch)
        if not batch:
            return
        self._has_committed = True
        with together(editor):
            edit = edit_or_go_on(editor, batch, sharing(editor.model))
            optimizer = cast(LightningOptimizer, editor.optimizers())
            # The wrapper would keep the attribute to itself.
            cast(EditOptimizer[E], optimizer.optimizer).stage(edit)
            optimizer.step()
            check_alike(editor)
        ids, seconds = [request.id for request in batch], time.perf_counter() - began
        editor.session.described(edit, batch, is_written=True)
        rows = request_rows(edit, ids, seconds)
        editor.history += rows
        self._rows += rows
        figures = [row["p_target"] for row in rows if "p_target" in row]
        if figures:
            mean = sum(figures) / len(figures)
            editor.log("p_target", mean, prog_bar=True, batch_size=len(batch))
        editor.log(*editor.target.size(), prog_bar=True, batch_size=len(batch))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        editor = cast("EditModule[E]", pl_module)
        epoch = trainer.current_epoch + 1
        has_committed, self._has_committed = self._has_committed, False
        if editor.repeat_requests or epoch == trainer.max_epochs:
            return
        requests = getattr(getattr(trainer, "datamodule", None), "requests", None)
        if not has_committed or (requests is not None and not editor.session.unanswered(requests)):
            trainer.should_stop = True
            rank_zero_info(
                f"Epoch {epoch} is the last: no request is left that is not in the model. "
                "`repeat_requests=True` makes them again in every epoch."
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        warn_of_not_taken(cast("EditModule[E]", pl_module), self._rows)

    @override
    def finish(self, editor: EditModule[E]) -> None:
        """Nothing: each edit is measured after its step."""

    @override
    def validation_step(self, editor: EditModule[E], batch: list[EditRequest]) -> None:
        measure(editor, batch)

    @override
    def log_validation(self, editor: EditModule[E]) -> None:
        log_metrics(editor, editor.val_metrics)

    @override
    def kept(self, editor: EditModule[E], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Edited weights follow from the base and the edits.
        return {} if editor.edit_optimizer.originals else editor.target.kept(state)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if "optimizer_states" not in checkpoint:  # `save_weights_only=True`
            edits = cast("EditModule[E]", pl_module).edit_optimizer.state_dict()
            checkpoint["lightning_edit"]["edits"] = edits


def edit_or_go_on(
    editor: EditModule[E], requests: Sequence[EditRequest], processes: Processes | None = None
) -> E:
    """An edit; an empty one where the method fails on every request, so that a run goes on."""
    provenance, delta = editor.provenance, editor.delta
    if delta.changes_weights and len(delta):
        # It goes on from an edited model, whose hash nobody will ask for before all is committed.
        provenance = replace(provenance, base=replace(provenance.base, sha256=""))
    try:
        return editor.session.edit(requests, editor.compute_edit, provenance, processes)
    except FailedRequestsError as error:
        rank_zero_warn(f"Nothing is written. {error}")
        nothing = editor.edit_optimizer.nothing
        nothing.details["failed"] = error.reasons
        nothing.batches = (RequestBatch(tuple(requests)),)
        return nothing


def edit_again(editor: EditModule[E], batch: RequestBatch, rows: list[RequestFigures]) -> E:
    """The edit of a batch that was committed before, for the model as it stands.

    Args:
        editor: The editor.
        batch: What the edit was made of.
        rows: Get the figures of its requests.
    """
    began, rounded = time.perf_counter(), bool(batch.pass_dtype)
    dtype: torch.dtype = getattr(torch, batch.pass_dtype or "bfloat16")
    with torch.autocast(editor.session.device.type, dtype, enabled=rounded):
        edit = edit_or_go_on(editor, batch.requests, sharing(editor.model))
    ids, seconds = [request.id for request in batch.requests], time.perf_counter() - began
    editor.session.described(edit, batch.requests, is_written=False)
    rows += request_rows(edit, ids, seconds)
    return edit


def request_rows(
    edit: Edit, ids: Sequence[str], seconds: float | None = None
) -> list[RequestFigures]:
    """Figures of an edit's requests, of those, too, that failed; their ids at least.

    Args:
        edit: The edit.
        ids: What was asked for.
        seconds: How long it took, which is shared out among the requests; left out when None.
    """
    rows = list(edit.details.get("requests", []))
    failed = edit.details.get("failed", {})
    rows += [{"id": i, "failed": why, "took": False} for i, why in failed.items()]
    rows = rows or [{"id": name} for name in ids]
    if seconds is None:
        return rows
    return [{**row, "seconds": seconds / len(ids)} for row in rows]


def warn_of_not_taken(editor: EditModule[E], rows: Sequence[RequestFigures]) -> None:
    """Says which edits did not take, and what to try; nothing where all did."""
    missed = not_taken(rows)
    if not missed:
        return
    remedies = [words for name, words in _REMEDIES.items() if name in editor.hparams]
    rank_zero_warn(
        f"{len(missed)} of {len(rows)} edits did not take: {some_of(missed, MAX_IDS)}. "
        "The edited model has another answer, token by token, than the new one. Try "
        f"{', '.join([*remedies, 'another method'])}, or words before the subject."
    )


def measure(editor: EditModule[E], batch: list[EditRequest]) -> None:
    """Measures a batch in the model as it stands, beside the unedited one."""
    with editor.unedited.evaluator(editor) as evaluator:
        before = evaluator.evaluate(batch)
    after = editor.evaluator.evaluate(batch, before.baseline)
    if counts(editor):
        after.update(editor.val_metrics)
        editor.measured.add(batch, before, after)


def log_metrics(editor: EditModule[E], metrics: MetricCollection) -> None:
    """Logs metrics, leaving out those that no probe was asked for, and begins them anew."""
    values = metrics.compute()
    found = {name: value for name, value in values.items() if not bool(torch.isnan(value))}
    editor.log_dict(found, sync_dist=True)  # equal already
    metrics.reset()
