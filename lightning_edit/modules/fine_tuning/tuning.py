# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors that fine-tune weights by Lightning's own loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.fine_tuning.inner_loop import InnerLoop
from lightning_edit.modules.fine_tuning.loop import AnswerLoss, LightningLoop, OptimizerChoice
from lightning_edit.modules.fine_tuning.tuned_weights import TunedTarget, TunedWeights
from lightning_edit.modules.targets import Target

__all__ = ["TuningModule"]


class TuningModule(EditModule[WeightDelta]):
    """Base of editors whose ``fit`` tunes weights: the MLP outputs of the layers, by Adam.

    What is committed is the difference of the tuned weights and the originals. A subclass chooses
    what is tuned, ``edited_names``. ``edit`` runs the same loss for ``steps`` steps over one batch
    and leaves the model alone: for people who hold a model, and for ``test`` and ``predict``.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to tune; negative ones count from the end. The method's default when None.
        lr: Learning rate of Adam.
        steps: Steps of ``edit``; ``fit`` goes by the Trainer's ``max_epochs``.
        optimizer: Makes the optimizer of the parameters, with its own learning rate. Adam if None.
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
        self.lr = lr
        self.steps = steps
        self.loss = AnswerLoss(per_sequence=self.per_sequence, end_token=end_token)
        self.choice = OptimizerChoice(self._adam, optimizer, lr_scheduler)
        self.loop: LightningLoop[WeightDelta] = LightningLoop(self.choice, train_mode=train_mode)
        self.parts.append(self.loop)
        self.fit_by(self.loop)

    def _adam(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        return Adam(parameters, lr=self.lr)

    @override
    def make_target(self, tree: ModelTree) -> Target[WeightDelta]:
        return TunedWeights(tree.model, self.edited_names(tree), self.loop.request_ids)

    @property
    def tuned(self) -> TunedTarget:
        """What is tuned in the model."""
        target = self.target
        assert isinstance(target, TunedTarget)  # noqa: S101 (what `make_target` returns)
        return target

    # -- what the loop asks ------------------------------------------------------------------

    def before_fit(self) -> None:
        """Nothing: a further fit goes on."""

    def tuned_parameters(self) -> list[nn.Parameter]:
        """What the optimizer of ``fit`` steps on."""
        return self.tuned.tuned_parameters()

    def before_steps(self) -> None:
        """Nothing: the weights that are tuned are the model's, or an adapter's."""

    def step_loss(self, requests: list[EditRequest], processes: Processes) -> Tensor:
        """The loss of this process's share of some requests, in nats."""
        for request in requests:
            self.loop.row(request)["steps"] += 1
        return self.batch_loss(self.encode(requests), processes)

    def after_step(self) -> None:
        """Nothing: the weights that are tuned are the model's."""

    def after_fit(self) -> None:
        """Sets the weights to what the edit, applied to the base, gives."""
        self.tuned.settle()

    def encode(self, requests: list[EditRequest]) -> EditBatch:
        """Requests as tokens, on the model's device, with the end token if it is to be learned."""
        return self.loss.encode(requests, self.tokens).to(self.session.device)

    def batch_loss(self, batch: EditBatch, processes: Processes | None = None) -> Tensor:
        """The loss of a process's share of a batch, in nats; see ``AnswerLoss``."""
        return self.loss(self.tree, batch, processes)

    # -- edits -------------------------------------------------------------------------------

    def tune(self, batch: EditBatch) -> WeightDelta:
        """Tunes weights on a batch by ``steps`` steps, as ``compute_edit`` may."""
        batch = self.loss.ended(batch)
        inner = InnerLoop(self.model, self.edited_names(self.tree), self.choice.make)
        loss = torch.zeros(())
        for _ in range(self.steps):
            loss = self.batch_loss(batch)
            inner.step(loss)
        return self.described(inner.delta(), batch, float(loss.detach()))

    def described(self, edit: WeightDelta, batch: EditBatch, loss: float) -> WeightDelta:
        """The edit with its figures."""
        norm = edit.norm()
        edit.details["requests"] = [
            {"id": request.id, "searched_loss": loss, "steps": self.steps, "norm": norm}
            for request in batch.requests
        ]
        return edit
