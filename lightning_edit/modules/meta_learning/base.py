# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What editors have in common that are trained before they edit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_edit.checkpoints import read_checkpoint
from lightning_edit.core.errors import ArtifactError, EditError
from lightning_edit.core.request import EditRequest, check_requests
from lightning_edit.evaluation.evaluator import Baseline, Evaluation, Evaluator
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.fitting import log_metrics
from lightning_edit.modules.meta_learning.replicas import Replicas
from lightning_edit.optim import E

__all__ = ["LearningModule", "read_editor"]


class LearningModule(EditModule[E]):
    """Base of editors with a network that is trained before it edits.

    ``fit`` trains ``network`` by Lightning's automatic optimization, so accumulation, clipping,
    precision, schedules, checkpoints and loggers are the Trainer's. The language model is frozen.

    ``validate`` makes edits, measures them and takes them out again. ``edit`` makes one, and
    ``TrainedEditor`` has ``fit`` commit those of a trained editor. Checkpoints hold the network
    alone.

    A subclass makes the network when it adopts a model, and writes ``check_ready``,
    ``lesson_loss`` and ``configure_optimizers``.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. The method's default when None.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].
    """

    #: Names of the figures that ``lesson_loss`` gives.
    figures: ClassVar[tuple[str, ...]] = ("loss", "edit")
    #: Requests that one edit answers when edits are measured; all of a batch if None.
    edits_at_once: int | None = 1

    def __init__(
        self, model: str = "smollm2", layers: list[int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, layers, **kwargs)
        self.automatic_optimization = True
        #: What is trained; there once the model is.
        self.network: Any = None
        #: Steps that were left out because a loss, a gradient or a factor was not finite.
        self.skipped = 0
        self.val_losses = nn.ModuleDict({name: MeanMetric() for name in self.figures})
        self._usable = 0
        self._baselines: dict[tuple[str, ...], Baseline] = {}

    # -- the method ----------------------------------------------------------------------------

    @abstractmethod
    def check_ready(self) -> None:
        """Checks that the network can edit.

        Raises:
            EditError: If it was never trained.
        """

    @abstractmethod
    def lesson_loss(
        self, requests: Sequence[EditRequest], replicas: Replicas | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of edits of some requests.

        Args:
            requests: With rephrases and locality probes.
            replicas: The processes that train together; None to only look.

        Returns:
            A scalar whose gradient is that of the network, and ``figures``; no figures and a
            loss of zero where something was not finite.
        """

    def token_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each token of the new answers, [N], from logits [N, V] and tokens [N]."""
        return cross_entropy(logits, targets, reduction="none")

    def trained_for(self) -> list[str]:
        """Names of the parameters that the network belongs to."""
        return []

    @property
    def is_ready(self) -> bool:
        """Whether the network can edit."""
        try:
            self.check_ready()
        except EditError:
            return False
        return True

    # -- a trained network ---------------------------------------------------------------------

    def load_editor(self, checkpoint: str | Path, *, any_base: bool = False) -> None:
        """Takes over a network that was trained before.

        Args:
            checkpoint: A checkpoint of a fit of the same method with the same settings.
            any_base: Edit a model with other weights than those it was trained with.

        Raises:
            ArtifactError: If it is no such checkpoint, or belongs to another model.
        """
        saved = read_editor(checkpoint)
        self.take_editor(saved, str(checkpoint), any_base=any_base)

    def take_editor(self, saved: Mapping[str, Any], where: str, *, any_base: bool) -> None:
        """Takes over a checkpoint in memory; see ``load_editor``.

        Args:
            saved: What ``read_editor`` has read.
            where: Its name in errors.
            any_base: As in ``load_editor``.
        """
        own = saved["lightning_edit"]
        method = own["editor"]["method"]
        if method != type(self).__name__:
            raise ArtifactError(
                f"`{where}` holds a {method}, not a {type(self).__name__}. Use that method, or "
                "`TrainedEditor`, which asks the checkpoint."
            )
        if own["editor"]["parameters"] != self.trained_for():
            raise ArtifactError(
                f"`{where}` was trained to edit {', '.join(own['editor']['parameters'])}, but "
                f"here {', '.join(self.trained_for())} are to be edited. Use the "
                "model, `layers` and `modules` that it was trained with."
            )
        if not any_base and own["base_sha256"] != self.base.sha256:
            raise ArtifactError(
                f"`{where}` was trained with the base weights {own['base_sha256'][:12]}…, but "
                f"{self.model_id} has {self.base.sha256[:12]}…: it is another model, or it has "
                "been edited already. Load the one it was trained with, or set `any_base` to edit "
                "this one anyway."
            )
        prefix = "network."
        state = {
            name.removeprefix(prefix): tensor
            for name, tensor in saved["state_dict"].items()
            if name.startswith(prefix)
        }
        try:
            self.network.load_state_dict(state)
        except RuntimeError as error:
            raise ArtifactError(
                f"`{where}` does not fit the network that these settings make: {error}"
            ) from None
        self.load_edit_state(own["edit_state"])

    # -- fit -----------------------------------------------------------------------------------

    @override
    def on_train_start(self) -> None:
        self.model.eval()

    @override
    def training_step(self, batch: list[EditRequest], batch_idx: int) -> Any:
        check_requests(batch)
        share = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        replicas = Replicas(share["rank"], share["num_replicas"])
        loss, figures = self.lesson_loss(batch, replicas)
        self.tell(figures, len(batch))
        return loss

    def tell(self, figures: Mapping[str, float], batch_size: int) -> None:
        """Logs the figures of a step; without any, the step counts as left out."""
        if figures:
            self.log_dict(dict(figures), prog_bar=True, batch_size=batch_size)
            self._usable += 1
        else:
            self.skipped += 1
        self.log("skipped", float(self.skipped), batch_size=batch_size)

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
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
    def on_train_end(self) -> None:
        if self.skipped:
            rank_zero_warn(
                f"{self.skipped} steps were left out because a loss, a gradient or a factor was "
                "not finite. Lower the learning rate, clip gradients, or load the model with dtype "
                "float32."
            )

    def _nothing(self) -> Tensor:
        """A loss of zero in which every parameter has a part, as several processes need it."""
        parts = [p.sum() for p in self.network.parameters() if p.requires_grad]
        return 0.0 * torch.stack(parts).sum()

    # -- measuring -----------------------------------------------------------------------------

    @override
    def validation_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        if not batch:
            return
        if self.trainer.sanity_checking and not self.is_ready:
            return
        with torch.inference_mode(False), torch.enable_grad():
            _, figures = self.lesson_loss(batch)
        for name, metric in self.val_losses.items():
            cast(MeanMetric, metric).update(figures.get(name, float("nan")), len(batch))
        in_fit = self.trainer.state.fn == "fit"
        evaluator = self.evaluator
        if in_fit:  # what a model would write takes many passes
            evaluator = Evaluator(self.model, self.tokens, readings=["teacher_forced"])
        size = self.edits_at_once or len(batch)
        for start in range(0, len(batch), size):
            group = batch[start : start + size]
            key = tuple(request.id for request in group)
            baseline = self._baselines.get(key) or evaluator.baseline(group)
            if in_fit:  # the model stays the same all along
                self._baselines[key] = baseline
            with self.session.written(self.edit(group)):
                found = evaluator.evaluate(group, baseline)
            found.update(self.val_metrics)
            self.note(found)

    def note(self, found: Evaluation) -> None:
        """Takes note of how an edit of a validation was scored; does nothing by default."""

    @override
    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking and not self.is_ready:
            return
        log_metrics(self, self.val_metrics)
        for name, metric in self.val_losses.items():
            found = cast(MeanMetric, metric)
            self.log(f"val/{name}", found.compute(), sync_dist=True)  # equal already
            found.reset()

    # -- checkpoints ---------------------------------------------------------------------------

    @override
    def edit_state(self) -> dict[str, Any]:
        return {**super().edit_state(), "skipped": self.skipped}

    @override
    def load_edit_state(self, state: Mapping[str, Any]) -> None:
        super().load_edit_state(state)
        self.skipped = int(state["skipped"])

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        whole = checkpoint["state_dict"]
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in whole.items() if name.startswith("network.")
        }
        checkpoint["lightning_edit"]["editor"] = {
            "method": type(self).__name__,
            "settings": {k: v for k, v in self.hparams.items() if not k.startswith("_")},
            "parameters": self.trained_for(),
        }


def read_editor(checkpoint: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of a trained editor.

    Args:
        checkpoint: A file that a fit of a ``LearningModule`` has written.

    Raises:
        ArtifactError: If there is none, or it is of something else.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise ArtifactError(
            f"There is no checkpoint `{checkpoint}`. Give a file that training an editor, "
            "such as MEND, has written."
        )
    saved = read_checkpoint(path)
    if "editor" not in saved.get("lightning_edit", {}):
        raise ArtifactError(
            f"`{checkpoint}` holds no trained editor. Give a file that training an editor (KE, "
            "MEND, MALMEN or SERAC) has written."
        )
    return saved
