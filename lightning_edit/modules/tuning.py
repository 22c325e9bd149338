# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors that fine-tune by Lightning's own loop: epochs over all edits, in mini-batches."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from typing_extensions import override

from lightning_edit.core.batch import IGNORE_INDEX, EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ModelError
from lightning_edit.core.request import EditRequest, check_requests
from lightning_edit.core.sharding import whole_tensor
from lightning_edit.functional.token_weights import token_weights
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.descent import Descent
from lightning_edit.modules.target_loss import target_nll, target_probabilities

__all__ = ["TuningModule"]


class TuningModule(EditModule):
    """Base of editors whose ``fit`` is plain training: the MLP outputs of the layers, by Adam.

    Optimization is automatic, so gradient clipping, accumulation, precision, schedules and the
    number of epochs are the Trainer's. What is committed is the difference of the tuned weights
    and the originals. Every process gets the whole batch and takes its share of the rows; the
    losses are weighted so that the averaged gradient is that of one process, up to rounding.

    A subclass chooses what is tuned, :meth:`edited_names`. :meth:`edit` runs the same loss for
    ``steps`` steps over one batch and leaves the weights alone: for people who hold a model, and
    for ``test`` and ``predict``.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to tune; negative ones count from the end. The method's default when None.
        lr: Learning rate of Adam.
        steps: Steps of :meth:`edit`; ``fit`` goes by the Trainer's ``max_epochs``.
        optimizer: Makes the optimizer of the parameters, with its own learning rate. Adam if None.
        lr_scheduler: Makes a learning rate schedule of the optimizer, one step an epoch.
        end_token: Teach the end token after each answer of a decoder-only model.
        train_mode: Have the model's dropout on while it is tuned.
        kwargs: Arguments of every editor, such as ``dtype``; see :class:`EditModule`.
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
        self._rows: dict[str, dict[str, Any]] = {}
        self._began = 0.0

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """The optimizer of the parameters, by the arguments."""
        if self.optimizer is not None:
            return self.optimizer(parameters)
        return Adam(parameters, lr=self.lr)

    def tuned_parameters(self) -> list[nn.Parameter]:
        """What the optimizer of ``fit`` steps on."""
        return list(self._edited_parameters().values())

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
    def training_step(self, batch: list[EditRequest], batch_idx: int) -> Tensor:  # type: ignore[override]
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
        self._show("‖Δ‖/‖W‖", self.relative_norm(), 1)

    @override
    def on_train_end(self) -> None:
        self.model.eval()
        self._settle(self.delta)

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

    # -- edits ---------------------------------------------------------------------------------

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        batch = self._ended(batch).to(batch.input_ids.device)
        descent = Descent(self.model, self.edited_names(self.tree), self.make_optimizer)
        loss = torch.zeros(())
        for _ in range(self.steps):
            loss = self.batch_loss(batch)
            descent.step(loss)
        return self._described(descent.delta(), batch, float(loss.detach()))

    def _described(self, edit: WeightDelta, batch: EditBatch, loss: float) -> WeightDelta:
        """The edit with its figures; it stands in the model."""
        norm = edit.norm()
        figures = {"loss": loss, "steps": self.steps, "norm": norm}
        edit.details["requests"] = [
            {"id": request.id, "p_target": p, **figures}
            for request, p in zip(
                batch.requests, target_probabilities(self.tree, batch), strict=True
            )
        ]
        return edit

    @property
    @override
    def delta(self) -> WeightDelta:
        """The difference of the weights as they stand and the originals."""
        originals = {n: whole_tensor(t) for n, t in self.edit_optimizer.originals.items()}
        tuned = {
            name: whole_tensor(parameter.detach()).to(originals[name].device)
            for name, parameter in self._edited_parameters().items()
        }
        delta = WeightDelta.between(originals, tuned)
        delta.provenance = replace(delta.provenance, request_ids=tuple(self._rows))
        return delta

    @override
    def committed(self) -> WeightDelta:
        delta = self.delta
        self._settle(delta)
        provenance = replace(self.provenance, request_ids=delta.provenance.request_ids)
        return WeightDelta(delta.changes, provenance).seal(
            self.model, self.edit_optimizer.originals
        )

    def _settle(self, delta: WeightDelta) -> None:
        """Sets the weights to original + change, which a last bit may tell from the tuned ones."""
        delta.write_(self.model, self.edit_optimizer.originals)
        self.edit_optimizer.delta = delta

    @override
    def on_test_start(self) -> None:
        self.edit_optimizer.delta = self.delta
        super().on_test_start()

    # -- checkpoints ---------------------------------------------------------------------------

    @override
    def edit_state(self) -> dict[str, Any]:
        return {**super().edit_state(), "history": list(self._rows.values())}

    @override
    def load_edit_state(self, state: Mapping[str, Any]) -> None:
        super().load_edit_state(state)
        self._rows = {row["id"]: row for row in self.history}
