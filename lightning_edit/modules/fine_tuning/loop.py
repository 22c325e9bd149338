# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Training by Lightning's own loop: epochs over all edits, in mini-batches."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_edit.core.batch import IGNORE_INDEX, EditBatch, PromptTokenizer
from lightning_edit.core.errors import EditError, ModelError, some_of
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest, check_requests
from lightning_edit.core.sharding import has_mean_gradient, is_sharded
from lightning_edit.functional.token_weights import token_weights
from lightning_edit.modules.fitting import (
    EditState,
    Fitting,
    log_metrics,
    measure,
    warn_of_not_taken,
)
from lightning_edit.optim import E
from lightning_edit.passes.target_loss import target_nll

if TYPE_CHECKING:
    from lightning_edit.modules.base import EditModule

__all__ = ["AnswerLoss", "LightningLoop", "LoopTrained", "OptimizerChoice"]

_LARGE = 2**26  # bytes of a model


@dataclass(frozen=True)
class AnswerLoss:
    """NLL of the new answers, each process taking its share of the rows.

    Args:
        per_sequence: Whether the loss is the mean of the sequences' means rather than of all
            target tokens.
        end_token: Whether the end token after each answer counts; an encoder-decoder has it anyway.
    """

    per_sequence: bool = False
    end_token: bool = False

    def encode(self, requests: Sequence[EditRequest], tokens: PromptTokenizer) -> EditBatch:
        """Requests as tokens, with the end token if it is to be learned."""
        return self.ended(EditBatch.from_requests(requests, tokens))

    def ended(self, batch: EditBatch) -> EditBatch:
        """A batch with the end token after each answer, if it is to be learned.

        Raises:
            ModelError: If the tokenizer has none.
        """
        end = batch.tokens.eos_id
        if not self.end_token or batch.tokens.is_encoder_decoder:  # which learns it anyway
            return batch
        if end is None:
            raise ModelError("`end_token=True`, but the tokenizer has no end token.")
        prompts, targets = [], []
        for row, labels, length in zip(
            batch.input_ids.tolist(),
            batch.labels.tolist(),
            batch.prompt_lengths.tolist(),
            strict=True,
        ):
            prompts.append(row[:length])
            targets.append([*(token for token in labels if token != IGNORE_INDEX), end])
        made = EditBatch.from_ids(prompts, targets, batch.tokens, batch.requests)
        return made.to(batch.input_ids.device)

    def __call__(
        self, tree: ModelTree, batch: EditBatch, processes: Processes | None = None
    ) -> Tensor:
        """The loss of a process's share of a batch, in nats.

        Args:
            tree: The model.
            batch: The whole batch.
            processes: Those that share its rows; this one alone if None.

        Returns:
            A scalar. The mean over all processes is the loss of the batch.
        """
        one = processes or Processes()
        weights = token_weights(batch.labels != IGNORE_INDEX, per_sequence=self.per_sequence)
        rows = list(one.share(len(batch)))
        if not rows:  # every process must go through all parameters, whose gradients are averaged
            rows, weights = [0], torch.zeros_like(weights)
        part, weights = batch.select(rows), weights[rows]
        nll = target_nll(tree, part)
        return one.count * (weights[part.labels != IGNORE_INDEX] * nll).sum()


@dataclass(frozen=True)
class OptimizerChoice:
    """Which optimizer steps on what is trained, and its schedule.

    Args:
        default: Makes the method's own optimizer of parameters.
        optimizer: Makes the one that the user asks for.
        lr_scheduler: Makes a learning rate schedule of the optimizer, one step an epoch.
    """

    default: Callable[[Iterable[nn.Parameter]], Optimizer]
    optimizer: OptimizerCallable | None = None
    lr_scheduler: LRSchedulerCallable | None = None

    def make(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """The optimizer of parameters.

        Raises:
            EditError: If a learning rate is not finite, so that a step would leave no weight whole.
        """
        made = (self.optimizer or self.default)(parameters)
        rates = [float(group["lr"]) for group in made.param_groups]
        if not all(map(math.isfinite, rates)):
            raise EditError(
                f"`lr` of {type(made).__name__} is expected to be finite, but got "
                f"{some_of(map(str, rates))}. Give a lower one; nothing was trained."
            )
        return made


class LoopTrained(Protocol):
    """What an editor says of its training by Lightning's loop."""

    def before_fit(self) -> None:
        """Checks that it can be trained so, and forgets an earlier training."""
        ...

    def tuned_parameters(self) -> list[nn.Parameter]:
        """What the optimizer of ``fit`` steps on."""
        ...

    def before_steps(self) -> None:
        """Takes over what a checkpoint held, which may be restored after the optimizer is made."""
        ...

    def step_loss(self, requests: list[EditRequest], processes: Processes) -> Tensor | None:
        """The loss of this process's share of some requests; None if there is nothing to learn."""
        ...

    def after_step(self) -> None:
        """Has whoever looks at the model after a step find it trained."""
        ...

    def after_fit(self) -> None:
        """Leaves the model as it is committed."""
        ...


class LightningLoop(Fitting[E]):
    """``fit`` is plain training: epochs over all edits, in mini-batches.

    Optimization is automatic, so gradient clipping, accumulation, precision, schedules and the
    number of epochs are the Trainer's. Every process gets the whole batch and takes its share of
    the rows; the losses are weighted so that the averaged gradient is that of one process, up to
    rounding.

    Args:
        choice: Which optimizer steps.
        train_mode: Whether the model's dropout is on while it is trained.
    """

    automatic = True

    def __init__(self, choice: OptimizerChoice, *, train_mode: bool = False) -> None:
        self.choice = choice
        self.train_mode = train_mode
        #: Figures of each request, by id.
        self.rows: dict[str, RequestFigures] = {}
        self.requests: dict[str, EditRequest] = {}
        self._asked: dict[str, EditRequest] = {}  # of the running fit
        self._is_measured = False
        self._began = 0.0

    def edit_state(self) -> EditState:
        """What a checkpoint keeps: the requests and their figures."""
        requests = [request.to_dict() for request in self.requests.values()]
        return {"history": list(self.rows.values()), "requests": requests}

    def load_edit_state(self, state: EditState) -> None:
        """Takes over what ``edit_state`` returned in an earlier run."""
        self.rows = {row["id"]: row.copy() for row in state["history"]}
        known = map(EditRequest.from_dict, state.get("requests", ()))
        self.requests = {request.id: request for request in known}

    def row(self, request: EditRequest) -> RequestFigures:
        """Figures of a request, begun when it is first met."""
        return self.rows.setdefault(request.id, {"id": request.id, "steps": 0, "seconds": 0.0})

    def request_ids(self) -> list[str]:
        """Ids of the requests that were trained on."""
        return list(self.rows)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _trained(pl_module).before_fit()

    @override
    def configure_optimizers(self, editor: EditModule[E]) -> OptimizerLRScheduler:
        trained = _trained(editor)
        optimizer = self.choice.make(trained.tuned_parameters())
        optimizer.register_step_post_hook(lambda *_: trained.after_step())
        if self.choice.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.choice.lr_scheduler(optimizer)}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that goes on measures in the end what it was asked for before, too.
        self._asked = {} if trainer.ckpt_path is None else dict(self.requests)
        model = cast(nn.Module, pl_module.model)
        if sum(p.nbytes for p in model.parameters()) >= _LARGE:
            # A Trainer and its module hold each other, and some copies of the weights. Until this
            # is asked for, all fits before may hold theirs: Python counts objects and not bytes.
            gc.collect()
        _trained(pl_module).before_steps()
        model.train(self.train_mode)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._began = time.perf_counter()

    @override
    def training_step(self, editor: EditModule[E], batch: list[EditRequest]) -> Tensor | None:
        check_requests(batch)
        share = editor.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        processes = Processes(share["rank"], share["num_replicas"])
        groups = [group for one in editor.trainer.optimizers for group in one.param_groups]
        tuned = [parameter for group in groups for parameter in group["params"]]
        if is_sharded(editor.model) and not any(map(has_mean_gradient, tuned)):
            processes = Processes()  # nobody averages gradients of what each process has whole
        for request in batch:
            self.row(request)
            self._asked.pop(request.id, None)  # the last one asked for is the last one in it
            self.requests[request.id] = self._asked[request.id] = request
        self._is_measured = False
        loss = _trained(editor).step_loss(batch, processes)
        if loss is not None:
            editor.log("loss", loss.detach(), prog_bar=True, batch_size=len(batch), sync_dist=True)
        return loss

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: list[EditRequest],
        batch_idx: int,
    ) -> None:
        seconds = (time.perf_counter() - self._began) / len(batch)
        for request in batch:
            self.rows[request.id]["seconds"] += seconds
        cast("EditModule[E]", pl_module).history = list(self.rows.values())

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name, value = cast("EditModule[E]", pl_module).target.size()
        pl_module.log(name, value, prog_bar=True, batch_size=1, sync_dist=True)  # equal already

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cast(nn.Module, pl_module.model).eval()
        _trained(pl_module).after_fit()
        editor = cast("EditModule[E]", pl_module)
        self.finish(editor)
        # Others were asked of the same prompt later, as after old answers that are to be forgotten.
        last = {request.prompt: id_ for id_, request in self._asked.items()}
        warn_of_not_taken(editor, [self.rows[id_] for id_ in last.values()])

    @override
    def finish(self, editor: EditModule[E]) -> None:
        """Measures the requests in the trained model, once."""
        if self._is_measured:
            return
        was_training = editor.model.training
        editor.model.eval()
        for id_, found in editor.session.measured(list(self._asked.values())).items():
            self.rows[id_] = {**self.rows[id_], **found}
        editor.model.train(was_training)
        editor.history = list(self.rows.values())
        self._is_measured = True

    @override
    def validation_step(self, editor: EditModule[E], batch: list[EditRequest]) -> None:
        measure(editor, batch)

    @override
    def log_validation(self, editor: EditModule[E]) -> None:
        log_metrics(editor, editor.val_metrics)

    @override
    def kept(self, editor: EditModule[E], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return editor.target.kept(state)


def _trained(editor: object) -> LoopTrained:
    return cast(LoopTrained, editor)
