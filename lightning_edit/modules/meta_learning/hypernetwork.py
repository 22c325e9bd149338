# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors that learn to edit: a network is trained, the language model is not."""

# Shapes: N rows of factors, G edits of a step, O outputs of a projection.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_edit.core.batch import IGNORE_INDEX, EditBatch
from lightning_edit.core.change import Change
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import EditError
from lightning_edit.core.locator import ModelTree, StackKind, WeightSite
from lightning_edit.core.projections import projection_sites
from lightning_edit.core.request import EditRequest
from lightning_edit.modules.meta_learning.base import LearningModule
from lightning_edit.modules.meta_learning.factors import (
    FactorRows,
    Factors,
    Positions,
    as_change,
    beside,
    capture,
    edited,
)
from lightning_edit.modules.meta_learning.judging import Part, Verdict, judge
from lightning_edit.modules.meta_learning.lessons import Lesson, TrainOn, shared_weights
from lightning_edit.modules.meta_learning.replicas import Replicas
from lightning_edit.passes.target_loss import target_probabilities

__all__ = ["HyperEditModule"]


class HyperEditModule(LearningModule[WeightDelta]):
    """Base of editors with a network that makes edits of weights out of gradients.

    The language model is frozen: neither is it written, nor do its weights get gradients. A step
    takes the factors of the edits' gradients, lets the network make edits of them, and has these
    act beside the weights. The loss is read in passes over ``micro_batch_size`` requests; its
    gradient with respect to the edits is then handed to the network as that of Σ ⟨gradient, edit⟩,
    which is the same gradient.

    A subclass writes ``build``, ``transform`` and ``configure_optimizers``.

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

    figures: ClassVar[tuple[str, ...]] = ("loss", "edit", "kl")
    #: Which rows the network gets, and at which places locality is judged.
    positions: Positions = "all"
    locality_positions: Positions = "all"

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
        for name, number in (
            ("edits_at_once", edits_at_once),
            ("micro_batch_size", micro_batch_size),
        ):
            if number is not None and number < 1:
                raise ValueError(f"`{name}` is expected to be at least 1, but got {number}.")
        if isinstance(modules, Mapping) and layers is not None:
            raise ValueError(
                "`modules` gives each projection its layers, and `layers` gives others. Leave "
                "`layers` out, or list the projections only."
            )
        self.projections = modules if modules is not None else self.default_projections()
        self.stacks: list[StackKind] = stacks if stacks is not None else ["encoder", "decoder"]
        self.edits_at_once = edits_at_once
        self.micro_batch_size = micro_batch_size
        self.train_on: TrainOn = train_on
        self.edit_weight = edit_weight
        self.locality_weight = locality_weight
        self.seed = seed
        self.sites: list[WeightSite] = []

    # -- the method ----------------------------------------------------------------------------

    @abstractmethod
    def build(self, sites: Sequence[WeightSite], generator: torch.Generator) -> nn.Module:
        """Makes the network for some matrices.

        Args:
            sites: The matrices, in the model's order.
            generator: Of all random numbers that it begins with.
        """

    @abstractmethod
    def transform(
        self,
        rows: Mapping[str, FactorRows],
        requests: Sequence[EditRequest],
        groups: Tensor,
        count: int,
        replicas: Replicas | None,
    ) -> dict[str, Factors]:
        """Makes edits of the factors of gradients.

        Args:
            rows: Factors by the parameter's name.
            requests: The requests.
            groups: The edit that each request belongs to, [len(requests)] int64.
            count: G, the number of edits.
            replicas: The processes that train together, whose rows statistics take in; None
                outside training, when statistics stay as they are.

        Returns:
            Factors [G, n, O] and [G, n, I] by the parameter's name.
        """

    def default_projections(self) -> list[str]:
        """Projections to edit where the user names none."""
        return ["mlp_in", "mlp_out"]

    @override
    def check_ready(self) -> None:
        if not all(getattr(part, "is_ready", True) for part in self.network.modules()):
            raise EditError(
                "This editor has no statistics yet by which it could normalize gradients: it was "
                "never trained. Train it with `Trainer.fit`, or load a trained one with "
                "`load_editor(checkpoint)` or `TrainedEditor(checkpoint=...)`."
            )

    def inner_weights(self, batch: EditBatch, groups: Tensor) -> Tensor:
        """How much each target token counts in the loss whose gradient is taken, [B, T]."""
        return shared_weights(batch.labels != IGNORE_INDEX, groups)

    def weights_now(self) -> tuple[float, float]:
        """Weights of the loss of the new answers and of the divergence."""
        return self.edit_weight, self.locality_weight

    def added_loss(self, edit: Tensor, divergence: Tensor) -> Tensor | None:
        """A further term with parameters of its own, given both losses; none by default."""
        return None

    # -- a model -------------------------------------------------------------------------------

    @override
    def trained_for(self) -> list[str]:
        return [site.name for site in self.sites]

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        return list(range(max(len(tree.blocks) - 3, 0), len(tree.blocks)))

    @override
    def edited_names(self, tree: ModelTree) -> list[str]:
        return [site.name for site in self._sites_of(tree)]

    def _sites_of(self, tree: ModelTree) -> list[WeightSite]:
        return projection_sites(
            tree, self.projections, self.layers, self.default_layers, self.stacks
        )

    @override
    def adopt(self, model: Any, tokenizer: Any) -> None:
        super().adopt(model, tokenizer)
        model.requires_grad_(False)
        self.sites = self._sites_of(self.tree)
        network = self.build(self.sites, torch.Generator().manual_seed(self.seed))
        self.network = network.to(next(model.parameters()).device)

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
            self.inner_weights(batch, groups),
            chosen=range(len(batch)),
            size=self.micro_batch_size,
            positions=self.positions,
        )
        with torch.no_grad():
            factors = self.transform(rows, batch.requests, groups, 1, None)
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
        with edited(self.model, self.sites, factors):
            probabilities = target_probabilities(tree, batch)
        edit.details["requests"] = [
            {"id": request.id, "loss": losses[i], "steps": 1, "p_target": p, "norm": norm}
            for i, (request, p) in enumerate(zip(batch.requests, probabilities, strict=True))
        ]
        return edit

    # -- fit -----------------------------------------------------------------------------------

    @override
    def lesson_loss(
        self, requests: Sequence[EditRequest], replicas: Replicas | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of edits of some requests: new answers said, everything else left alone.

        Args:
            requests: With rephrases and locality probes.
            replicas: The processes that train together, each of which takes its share; statistics
                go on. None to only look.

        Returns:
            A scalar whose gradient is that of the network, and the figures ``loss``, ``edit`` (in
            nats) and ``kl``; no figures and a loss of zero where something was not finite.

        Raises:
            RequestError: If a request lacks a rephrase or a locality probe.
        """
        if replicas is None:
            self.check_ready()
        one = replicas or Replicas()
        part = self._part(requests, replicas)
        factors = self._edits(part, replicas)
        found = None if factors is None else self._verdict(part, factors, one)
        if factors is None or found is None:
            return self._nothing(), {}
        edit_weight, locality_weight = self.weights_now()
        value = edit_weight * found.edit + locality_weight * found.kl
        loss = self._pull(factors, found.gradients, one)
        loss = loss - loss.detach() + value
        added = self.added_loss(found.edit, found.kl)
        if added is not None:
            loss = loss + added
        return loss, {
            "loss": float(loss.detach()),
            "edit": float(found.edit),
            "kl": float(found.kl),
        }

    def _part(self, requests: Sequence[EditRequest], replicas: Replicas | None) -> Part:
        """Requests as the network is trained on them, and the share of this process."""
        one = replicas or Replicas()
        turn = self.current_epoch if replicas is not None else 0
        lesson = Lesson.from_requests(
            requests,
            self.tokens,
            train_on=self.train_on,
            turn=turn,
            answers_needed=self.locality_positions == "answers",
        ).to(next(self.model.parameters()).device)
        groups, count = self._groups(len(requests))
        together = self.edits_at_once is None
        mine = [
            i
            for i, group in enumerate(groups.tolist())
            if (i if together else group) % one.count == one.rank
        ]
        return Part(lesson, requests, groups, count, mine)

    def _edits(
        self, part: Part, replicas: Replicas | None, carried: Mapping[str, Factors] | None = None
    ) -> dict[str, Factors] | None:
        """The network's edits of a part of a training; None where something is not finite."""
        one = replicas or Replicas()
        # Gradients of float16 passes would leave its range, for which only the loss is scaled.
        with torch.autocast(part.groups.device.type, enabled=False):
            with beside(self.model, self.sites, carried):
                rows, _ = capture(
                    self.tree,
                    self.sites,
                    part.lesson.inner,
                    self.inner_weights(part.lesson.inner, part.groups),
                    chosen=part.mine,
                    size=self.micro_batch_size,
                    positions=self.positions,
                )
            if self.edits_at_once is None:
                rows = {name: one.gathered(row) for name, row in rows.items()}
            sums = [row.inputs.sum() + row.gradients.sum() for row in rows.values()]
            if not one.agree(bool(torch.stack(sums).isfinite().all())):
                return None
            return self.transform(rows, part.requests, part.groups, part.count, replicas)

    def _verdict(
        self,
        part: Part,
        factors: Mapping[str, Factors],
        one: Replicas,
        carried: Mapping[str, Factors] | None = None,
    ) -> Verdict | None:
        """What becomes of a part's texts with edits; None where something is not finite."""
        kind = part.groups.device.type
        mixed = torch.is_autocast_enabled(kind)
        rounded = mixed and torch.get_autocast_dtype(kind) == torch.bfloat16
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=rounded):
            found = judge(
                self.tree,
                self.sites,
                part,
                factors,
                token_loss=self.token_loss,
                weights=self.weights_now(),
                positions=self.locality_positions,
                size=self.micro_batch_size,
                carried=carried,
            )
        found = Verdict(one.total(found.edit), one.total(found.kl), found.gradients)
        sums = [found.edit, found.kl, *(gradient.sum() for gradient in found.gradients)]
        return found if one.agree(bool(torch.stack(sums).isfinite().all())) else None

    def _pull(
        self, factors: Mapping[str, Factors], gradients: Sequence[Tensor], one: Replicas
    ) -> Tensor:
        """Σ ⟨gradient, edit⟩, whose gradient is the network's."""
        ends = [tensor for found in factors.values() for tensor in (found.u, found.v)]
        pull = torch.zeros((), device=ends[0].device)
        for end, gradient in zip(ends, gradients, strict=True):
            if end.requires_grad:
                pull = pull + (end * gradient).sum()
        # Processes average their gradients, whereas the loss is a sum over shares.
        return one.count * pull if pull.requires_grad else self._nothing()

    def _groups(self, requests: int) -> tuple[Tensor, int]:
        device = next(self.model.parameters()).device
        size = self.edits_at_once or requests
        return torch.arange(requests, device=device) // size, -(-requests // size)
