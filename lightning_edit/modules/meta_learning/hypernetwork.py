# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors that learn to edit: a network is trained, the language model is not."""

# Shapes: N rows of factors, G edits of a step, O outputs of a projection.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_edit.core.batch import IGNORE_INDEX, EditBatch
from lightning_edit.core.change import Change
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import EditError
from lightning_edit.core.locator import ModelTree, StackKind, WeightSite
from lightning_edit.core.processes import Processes
from lightning_edit.core.projections import projection_sites
from lightning_edit.core.request import EditRequest
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.meta_learning.checkpoints import (
    EditorCheckpoint,
    read_editor,
    take_network,
)
from lightning_edit.modules.meta_learning.factors import (
    Factors,
    Gradients,
    Positions,
    as_change,
    capture,
)
from lightning_edit.modules.meta_learning.objectives import Objective, WeightedSum
from lightning_edit.modules.meta_learning.training import EditorTraining, is_ready
from lightning_edit.modules.meta_learning.training_batch import TrainOn, shared_weights
from lightning_edit.modules.meta_learning.training_loss import BatchLoss, TrainingLoss
from lightning_edit.modules.targets import Target, WeightTarget
from lightning_edit.passes.borrowing import borrowed

__all__ = ["HyperEditModule", "check_counts"]


class HyperEditModule(EditModule[WeightDelta]):
    """Base of editors with a network that makes edits of weights out of gradients.

    ``fit`` trains the network, ``edit`` makes an edit by it, and ``TrainedEditor`` has ``fit``
    commit those of a trained one.

    The language model is frozen: neither is it written, nor do its weights get gradients. A step
    takes the factors of the edits' gradients, lets the network make edits of them, and has these
    act beside the weights. The loss is read in passes over ``micro_batch_size`` requests; its
    gradient with respect to the edits is then handed to the network as that of Σ ⟨gradient, edit⟩,
    which is the same gradient.

    A subclass writes ``build``, ``transform`` and ``network_optimizer``. It may be trained for an
    ``objective`` or by a ``training_loss`` of its own, which are objects.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. The last three if None.
        modules: Projections to edit in each layer: ``mlp_in`` (gate and up projection where the
            MLP is gated), ``mlp_out``, ``attention_in``, ``attention_out``, or a projection's own
            name, such as ``up_proj``. A mapping gives each of them layers of its own. The method's
            default if None.
        stacks: Stacks of an encoder-decoder model to edit; both if None.
        edits_at_once: Requests that one edit answers in training: a batch of the data is divided
            into so many, each with an edit of its own. All requests of a batch if None.
        micro_batch_size: Requests in a pass of the language model.
        train_on: What the edited model has to answer: a rephrase of each request, its prompt, or
            both.
        edit_weight: Weight of the loss of the new answers.
        locality_weight: Weight of KL(unedited ‖ edited) on the locality probes.
        seed: Of the numbers the network begins with.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].
    """

    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")
    #: Names of the figures that ``edit_loss`` gives.
    figures: ClassVar[tuple[str, ...]] = ("loss", "edit", "kl")
    #: Projections to edit where the user names none.
    default_modules: ClassVar[tuple[str, ...]] = ("mlp_in", "mlp_out")
    #: Which rows the network gets, and at which places locality counts.
    positions: ClassVar[Positions] = "all"
    locality_positions: ClassVar[Positions] = "all"
    #: What a request's gradient is of: the ``mean`` or the ``sum`` of the losses of its own target
    #: tokens, so that it does not depend on other requests, or its part of the mean over all
    #: tokens of its ``edit``.
    gradient_of: Literal["mean", "sum", "edit"] = "mean"

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        modules: list[str] | dict[str, list[int]] | None = None,
        stacks: list[StackKind] | None = None,
        edits_at_once: int | None = 1,
        micro_batch_size: int = 8,
        train_on: TrainOn = "rephrase",
        edit_weight: float = 0.1,
        locality_weight: float = 1.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        check_counts(edits_at_once=edits_at_once, micro_batch_size=micro_batch_size)
        if isinstance(modules, Mapping) and layers is not None:
            raise ValueError(
                "`modules` gives each projection its layers, and `layers` gives others. Leave "
                "`layers` out, or list the projections only."
            )
        self.projections = modules if modules is not None else list(self.default_modules)
        self.stacks: list[StackKind] = stacks if stacks is not None else ["encoder", "decoder"]
        self.edits_at_once = edits_at_once
        self.micro_batch_size = micro_batch_size
        self.train_on: TrainOn = train_on
        self.seed = seed
        self.sites: list[WeightSite] = []
        #: What is trained; there once the model is.
        self.network: Any = None
        self.objective: Objective = WeightedSum(edit_weight, locality_weight)
        self.training_loss: TrainingLoss = BatchLoss()
        self.network_training = EditorTraining[WeightDelta](self.figures, edits_at_once)
        self.val_losses = self.network_training.losses  # moves to other devices with the editor
        self.parts.append(self.network_training)
        self.fit_by(self.network_training)

    # -- the method ----------------------------------------------------------------------------

    @abstractmethod
    def build(
        self, tree: ModelTree, sites: Sequence[WeightSite], generator: torch.Generator
    ) -> nn.Module:
        """Makes the network for some matrices.

        Args:
            tree: The model that they are of.
            sites: The matrices, in the model's order.
            generator: Of all random numbers that it begins with.
        """

    @abstractmethod
    def transform(self, gradients: Gradients) -> dict[str, Factors]:
        """Makes edits of gradients.

        Args:
            gradients: Those of some requests.

        Returns:
            Factors [G, n, O] and [G, n, I] by the parameter's name.
        """

    @abstractmethod
    def network_optimizer(self) -> OptimizerLRScheduler:
        """What steps the network: an optimizer, or all that Lightning accepts in its place."""

    def token_weights(self, batch: EditBatch, groups: Tensor) -> Tensor:
        """How much each target token counts in the loss whose gradient is taken.

        Args:
            batch: The requests, B of them.
            groups: The edit that each belongs to, [B] int64.

        Returns:
            [B, T] float32.
        """
        mask = batch.labels != IGNORE_INDEX
        if self.gradient_of == "sum":
            return mask.float()
        if self.gradient_of == "mean":
            groups = torch.arange(len(batch), device=groups.device)
        return shared_weights(mask, groups)

    # -- a model -----------------------------------------------------------------------------

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        return list(range(max(len(tree.blocks) - 3, 0), len(tree.blocks)))

    @override
    def edited_names(self, tree: ModelTree) -> list[str]:
        return [site.name for site in self._sites_of(tree)]

    @override
    def make_target(self, tree: ModelTree) -> Target[WeightDelta]:
        """The weights of the projections, for which a network is built."""
        self.sites = self._sites_of(tree)
        network = self.build(tree, self.sites, torch.Generator().manual_seed(self.seed))
        self.network = network.to(next(tree.model.parameters()).device)
        return WeightTarget(tree.model, self.trained_for(), trainable=False)

    def _sites_of(self, tree: ModelTree) -> list[WeightSite]:
        return projection_sites(
            tree, self.projections, self.layers, self.default_layers, self.stacks
        )

    # -- a trained network -------------------------------------------------------------------

    def check_ready(self) -> None:
        """Checks that the network can edit.

        Raises:
            EditError: If it has no statistics yet.
        """
        if not all(getattr(part, "is_ready", True) for part in self.network.modules()):
            raise EditError(
                "This editor has no statistics yet by which it could normalize gradients: it was "
                "never trained. Train it with `Trainer.fit`, or load a trained one with "
                "`load_editor(checkpoint)` or `TrainedEditor(checkpoint=...)`."
            )

    @property
    def is_ready(self) -> bool:
        """Whether the network can edit."""
        return is_ready(self)

    @property
    def skipped(self) -> int:
        """Steps that were left out because a loss, a gradient or a factor was not finite."""
        return self.network_training.skipped

    def trained_for(self) -> list[str]:
        """Names of the parameters that the network belongs to."""
        return [site.name for site in self.sites]

    def load_editor(self, checkpoint: str | Path, *, any_base: bool = False) -> None:
        """Takes over a network that was trained before.

        Args:
            checkpoint: A checkpoint of a fit of the same method with the same settings.
            any_base: Edit a model with other weights than those it was trained with.

        Raises:
            ArtifactError: If it is no such checkpoint, or belongs to another model.
        """
        self.take_editor(read_editor(checkpoint), str(checkpoint), any_base=any_base)

    def take_editor(self, saved: EditorCheckpoint, where: str, *, any_base: bool) -> None:
        """Takes over a checkpoint in memory; see ``load_editor``.

        Args:
            saved: What ``read_editor`` has read.
            where: Its name in errors.
            any_base: As in ``load_editor``.
        """
        take_network(self, self.network, self.trained_for(), saved, where, any_base=any_base)

    def edit_loss(
        self, requests: Sequence[EditRequest], processes: Processes | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of edits of some requests: new answers said, everything else left alone.

        Args:
            requests: With rephrases and locality probes.
            processes: Those that train together, each of which takes its share; statistics go on.
                None to only look.

        Returns:
            A scalar whose gradient is that of the network, and the figures ``loss``, ``edit`` (in
            nats) and ``kl``; no figures and a loss of zero where something was not finite.

        Raises:
            RequestError: If a request lacks a rephrase or a locality probe.
        """
        with borrowed(self.model):
            return self.training_loss.of(self, requests, processes)

    # -- edits ---------------------------------------------------------------------------------

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        self.check_ready()
        tree, device = self.tree, batch.input_ids.device
        groups = torch.zeros(len(batch), dtype=torch.long, device=device)
        rows, losses = capture(
            tree,
            self.sites,
            batch,
            self.token_weights(batch, groups),
            chosen=range(len(batch)),
            size=self.micro_batch_size,
            positions=self.positions,
        )
        with torch.no_grad():
            tokens = int((batch.labels != IGNORE_INDEX).sum())
            factors = self.transform(Gradients(rows, batch.requests, groups, 1, tokens, None))
        changes: dict[str, Change] = {}
        for site in self.sites:
            found = factors[site.name]
            changes[site.name] = as_change(site, found.u[0], found.v[0])
        edit = WeightDelta(changes)
        norm = edit.norm()
        if not norm < float("inf"):
            raise EditError(
                "The edit is not finite. Nothing was written. The editor may not have been trained "
                "well, or the model's precision is too low: load it with dtype float32."
            )
        edit.details["requests"] = [
            {"id": request.id, "searched_loss": losses[i], "steps": 1, "norm": norm}
            for i, request in enumerate(batch.requests)
        ]
        return edit


def check_counts(**counts: int | None) -> None:
    """Checks that arguments are at least 1, or None.

    Raises:
        ValueError: If one is not.

    Examples:
        >>> check_counts(rank=0)
        Traceback (most recent call last):
            ...
        ValueError: `rank` is expected to be at least 1, but got 0.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"`{name}` is expected to be at least 1, but got {count}.")
