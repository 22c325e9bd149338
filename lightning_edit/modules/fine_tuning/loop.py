# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors whose ``fit`` is plain training, by Lightning's own loop: epochs over all edits."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from typing_extensions import override

from lightning_edit.core.batch import IGNORE_INDEX, EditBatch
from lightning_edit.core.errors import ModelError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.request import EditRequest, check_requests
from lightning_edit.functional.token_weights import token_weights
from lightning_edit.modules.base import EditModule
from lightning_edit.optim import E
from lightning_edit.passes.target_loss import target_nll

__all__ = ["LoopModule"]


class LoopModule(EditModule[E]):
    """Base of editors that Lightning's own loop trains: epochs over all edits, in mini-batches.

    Optimization is automatic, so gradient clipping, accumulation, precision, schedules and the
    number of epochs are the Trainer's. Every process gets the whole batch and takes its share of
    the rows; the losses are weighted so that the averaged gradient is that of one process, up to
    rounding.

    A subclass says what is trained, ``tuned_parameters``. ``edit`` runs the same loss for
    ``steps`` steps over one batch and leaves the model alone: for people who hold a model, and
    for ``test`` and ``predict``.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. The method's default when None.
        lr: Learning rate.
        steps: Steps of ``edit``; ``fit`` goes by the Trainer's ``max_epochs``.
        optimizer: Makes the optimizer of the parameters, with its own learning rate. The method's
            own if None.
        lr_scheduler: Makes a learning rate schedule of the optimizer, one step an epoch.
        end_token: Teach the end token after each answer of a decoder-only model.
        train_mode: Have the model's dropout on while it is trained.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].
    """

    #: Whether the loss is the mean of the sequences' means rather than of all target tokens.
    per_sequence: ClassVar[bool] = False
    unsaved_arguments: ClassVar[tuple[str, ...]] = ("optimizer", "lr_scheduler")

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        lr: float = 5e-5,
        steps: int = 25,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        end_token: bool = False,
        train_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        if steps < 1:
            raise ValueError(f"`steps` is expected to be at least 1, but got {steps}.")
        self.automatic_optimization = True
        self.lr = lr
        self.steps = steps
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.end_token = end_token
        self.train_mode = train_mode
        self._rows: dict[str, RequestFigures] = {}
        self._began = 0.0

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """The optimizer of the parameters, by the arguments."""
        if self.optimizer is not None:
            return self.optimizer(parameters)
        return Adam(parameters, lr=self.lr)

    @abstractmethod
    def tuned_parameters(self) -> list[nn.Parameter]:
        """What the optimizer of ``fit`` steps on."""

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.tuned_parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}

    # -- fit -----------------------------------------------------------------------------------

    @override
    def on_train_start(self) -> None:
        self.model.train(self.train_mode)

    @override
    def on_train_batch_start(self, batch: list[EditRequest], batch_idx: int) -> None:
        self._began = time.perf_counter()

    @override
    def training_step(self, batch: list[EditRequest], batch_idx: int) -> Tensor:
        check_requests(batch)
        for request in batch:
            row = self._rows.setdefault(request.id, {"id": request.id, "steps": 0, "seconds": 0.0})
            row["steps"] += 1
        tokens = self.encode(batch)
        share = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        loss = self.batch_loss(tokens, share["rank"], share["num_replicas"])
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(batch), sync_dist=True)
        return loss

    @override
    def on_train_batch_end(self, outputs: Any, batch: list[EditRequest], batch_idx: int) -> None:
        seconds = (time.perf_counter() - self._began) / len(batch)
        for request in batch:
            self._rows[request.id]["seconds"] += seconds
        self.history = list(self._rows.values())

    @override
    def on_train_epoch_end(self) -> None:
        self.log(*self.target.size(), prog_bar=True, batch_size=1, sync_dist=True)  # equal already

    @override
    def on_train_end(self) -> None:
        self.model.eval()

    def encode(self, requests: list[EditRequest]) -> EditBatch:
        """Requests as tokens, on the model's device, with the end token if it is to be learned."""
        return self._ended(EditBatch.from_requests(requests, self.tokens)).to(
            next(self.model.parameters()).device
        )

    def batch_loss(self, batch: EditBatch, rank: int = 0, replicas: int = 1) -> Tensor:
        """The loss of a process's share of a batch, in nats.

        Args:
            batch: The whole batch.
            rank: Which share: rows ``rank``, ``rank + replicas``, and so on.
            replicas: Number of shares.

        Returns:
            A scalar. The mean over all shares is the loss of the batch.
        """
        weights = token_weights(batch.labels != IGNORE_INDEX, per_sequence=self.per_sequence)
        rows = list(range(rank, len(batch), replicas))
        if not rows:  # every process must go through all parameters, whose gradients are averaged
            rows, weights = [0], torch.zeros_like(weights)
        part, weights = batch.select(rows), weights[rows]
        nll = target_nll(self.tree, part)
        return replicas * (weights[part.labels != IGNORE_INDEX] * nll).sum()

    def _ended(self, batch: EditBatch) -> EditBatch:
        end = self.tokens.eos_id
        if not self.end_token or self.tokens.is_encoder_decoder:  # which learns it anyway
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
        return EditBatch.from_ids(prompts, targets, self.tokens, batch.requests)

    # -- checkpoints ---------------------------------------------------------------------------

    @override
    def edit_state(self) -> dict[str, Any]:
        return {**super().edit_state(), "history": list(self._rows.values())}

    @override
    def load_edit_state(self, state: Mapping[str, Any]) -> None:
        super().load_edit_state(state)
        self._rows = {row["id"]: row for row in self.history}
