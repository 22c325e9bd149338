# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The loss that a network is trained by: of the edits of a batch, or of edits in a sequence."""

# Shapes: G edits, n factors of an edit, O outputs and I inputs of a projection.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from lightning_edit.core.batch import IGNORE_INDEX
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest
from lightning_edit.modules.meta_learning.edit_losses import EditLosses, edit_losses
from lightning_edit.modules.meta_learning.factors import (
    Factors,
    Gradients,
    capture,
    edited,
    stacked,
)
from lightning_edit.modules.meta_learning.training import zero_loss
from lightning_edit.modules.meta_learning.training_batch import GroupedRequests, TrainingBatch

if TYPE_CHECKING:
    from lightning_edit.modules.meta_learning.hypernetwork import HyperEditModule

__all__ = ["BatchLoss", "SequenceLoss", "TrainingLoss"]


class TrainingLoss(ABC):
    """How the loss of some requests comes of the edits that a network makes for them."""

    @abstractmethod
    def of(
        self,
        editor: HyperEditModule,
        requests: Sequence[EditRequest],
        processes: Processes | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss, and its figures ``loss``, ``edit`` (in nats) and ``kl``.

        Args:
            editor: The editor with the network.
            requests: With rephrases and locality probes.
            processes: Those that train together, each of which takes its share; statistics go on.
                None to only look.

        Returns:
            A scalar whose gradient is that of the network; no figures and a loss of zero where
            something was not finite.

        Raises:
            RequestError: If a request lacks a rephrase or a locality probe.
        """


class BatchLoss(TrainingLoss):
    """The edits of a batch, each by itself: new answers said, all else left alone."""

    @override
    def of(
        self,
        editor: HyperEditModule,
        requests: Sequence[EditRequest],
        processes: Processes | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if processes is None:
            editor.check_ready()
        asked = _grouped(editor, requests, processes)
        factors = _edits(editor, asked)
        found = None if factors is None else _losses(editor, asked, factors)
        if factors is None or found is None:
            return zero_loss(editor.network), {}
        edit_weight, locality_weight = editor.objective.weights(editor.network)
        value = edit_weight * found.edit + locality_weight * found.kl
        loss = _with_gradient(editor, factors, found, asked.processes)
        loss = loss - loss.detach() + value
        added = editor.objective.added(editor.network, found.edit, found.kl)
        if added is not None:
            loss = loss + added
        return loss, {
            "loss": float(loss.detach()),
            "edit": float(found.edit),
            "kl": float(found.kl),
        }


class SequenceLoss(TrainingLoss):
    """Edits that follow one another, each on top of those before it.

    After the t-th edit, the requests of it and of those before count, the j-th before it by γʲ:
    L = 1/n Σ_t (Σ_j γʲ L(t − j) + λ ‖ΔW_t‖²). Edits reach one another by the model alone: the
    gradient of each is its own.

    Args:
        length: n, the number of edits that a batch is divided into.
        discount: γ.
        back_depth: How many edits count, the latest included.
        shift_penalty: λ.

    References:
        Reinforced Lifelong Editing for Language Models, arXiv 2502.05759.
    """

    def __init__(self, length: int, discount: float, back_depth: int, shift_penalty: float) -> None:
        self.length = length
        self.discount = discount
        self.back_depth = back_depth
        self.shift_penalty = shift_penalty

    @override
    def of(
        self,
        editor: HyperEditModule,
        requests: Sequence[EditRequest],
        processes: Processes | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """As the base has it; outside training, the loss of one edit that answers all requests."""
        if processes is None:
            return BatchLoss().of(editor, requests)
        size = -(-len(requests) // self.length)
        turns = -(-len(requests) // size)
        edit_weight, locality_weight = editor.objective.weights(editor.network)
        seen: list[GroupedRequests] = []
        earlier: dict[str, Factors] | None = None
        loss = torch.zeros((), device=next(editor.model.parameters()).device)
        figures = dict.fromkeys(("loss", "edit", "kl"), 0.0)
        for start in range(0, len(requests), size):
            seen.append(_grouped(editor, requests[start : start + size], processes))
            factors = _edits(editor, seen[-1], earlier)
            if factors is None:
                return zero_loss(editor.network), {}
            for age, asked in enumerate(reversed(seen[-self.back_depth :])):
                found = _losses(editor, asked, factors, earlier)
                if found is None:
                    return zero_loss(editor.network), {}
                share = self.discount**age / turns
                loss = loss + share * _with_gradient(editor, factors, found, processes)
                edit, kl = float(found.edit), float(found.kl)
                figures["loss"] += share * (edit_weight * edit + locality_weight * kl)
                if not age:  # what is shown is how edits do right after they are made
                    figures["edit"] += share * edit
                    figures["kl"] += share * kl
            penalty = self.shift_penalty / turns * _squared_norm(factors)
            loss = loss + penalty
            figures["loss"] += float(penalty.detach())
            earlier = _on_top(earlier, factors)
        return loss - loss.detach() + figures["loss"], figures


def _grouped(
    editor: HyperEditModule, requests: Sequence[EditRequest], processes: Processes | None
) -> GroupedRequests:
    """Requests as the network is trained on them, and the share of this process."""
    all_of_them = processes or Processes()
    device = next(editor.model.parameters()).device
    batch = TrainingBatch.from_requests(
        requests,
        editor.tokens,
        train_on=editor.train_on,
        turn=0 if processes is None else editor.current_epoch,
        answers_needed=editor.locality_positions == "answers",
    ).to(device)
    size = editor.edits_at_once or len(requests)
    groups = torch.arange(len(requests), device=device) // size
    # An edit of all requests is shared out by request, others each are the work of one process.
    owners = groups.tolist() if editor.edits_at_once else range(len(requests))
    mine = [i for i, owner in enumerate(owners) if owner % all_of_them.count == all_of_them.rank]
    count = -(-len(requests) // size)
    in_training = processes is not None
    return GroupedRequests(requests, batch, groups, count, all_of_them, mine, in_training)


def _edits(
    editor: HyperEditModule,
    asked: GroupedRequests,
    earlier: Mapping[str, Factors] | None = None,
) -> dict[str, Factors] | None:
    """The network's edits; None where something is not finite."""
    processes = asked.processes
    # Gradients of float16 passes would leave its range, for which only the loss is scaled.
    with torch.autocast(asked.groups.device.type, enabled=False):
        with edited(editor.model, editor.sites, earlier):
            rows, _ = capture(
                editor.tree,
                editor.sites,
                asked.batch.inner,
                editor.token_weights(asked.batch.inner, asked.groups),
                chosen=asked.mine,
                size=editor.micro_batch_size,
                positions=editor.positions,
            )
        if editor.edits_at_once is None:
            rows = {name: row.joined(processes) for name, row in rows.items()}
        sums = [row.inputs.sum() + row.gradients.sum() for row in rows.values()]
        if not processes.agree(bool(torch.stack(sums).isfinite().all())):
            return None
        # Rows that have been joined are those of all processes already.
        own = Processes() if editor.edits_at_once is None else processes
        learning = own if asked.in_training else None
        tokens = int((asked.batch.inner.labels != IGNORE_INDEX).sum())
        return editor.transform(
            Gradients(rows, asked.requests, asked.groups, asked.count, tokens, learning)
        )


def _losses(
    editor: HyperEditModule,
    asked: GroupedRequests,
    factors: Mapping[str, Factors],
    earlier: Mapping[str, Factors] | None = None,
) -> EditLosses | None:
    """Losses over all processes, and this one's gradients; None where one is not finite."""
    kind = asked.groups.device.type
    mixed = torch.is_autocast_enabled(kind)
    rounded = mixed and torch.get_autocast_dtype(kind) == torch.bfloat16
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=rounded):
        found = edit_losses(
            editor.tree,
            editor.sites,
            asked,
            factors,
            token_loss=editor.objective.token_loss,
            weights=editor.objective.weights(editor.network),
            positions=editor.locality_positions,
            size=editor.micro_batch_size,
            earlier=earlier,
        )
    one = asked.processes
    found = EditLosses(one.total(found.edit), one.total(found.kl), found.gradients)
    sums = [found.edit, found.kl, *(gradient.sum() for gradient in found.gradients)]
    return found if one.agree(bool(torch.stack(sums).isfinite().all())) else None


def _with_gradient(
    editor: HyperEditModule,
    factors: Mapping[str, Factors],
    found: EditLosses,
    processes: Processes,
) -> Tensor:
    """Σ ⟨gradient, edit⟩, whose gradient is the network's."""
    ends = [tensor for one in factors.values() for tensor in (one.u, one.v)]
    pull = torch.zeros((), device=ends[0].device)
    for end, gradient in zip(ends, found.gradients, strict=True):
        if end.requires_grad:
            pull = pull + (end * gradient).sum()
    # Processes average their gradients, whereas the loss is a sum over shares.
    return processes.count * pull if pull.requires_grad else zero_loss(editor.network)


def _squared_norm(factors: Mapping[str, Factors]) -> Tensor:
    """‖ΔW‖² (Frobenius) over all projections, of their factors."""
    squares = [((f.u @ f.u.mT) * (f.v @ f.v.mT)).sum() for f in factors.values()]
    return torch.stack(squares).sum()


def _on_top(
    earlier: Mapping[str, Factors] | None, factors: Mapping[str, Factors]
) -> dict[str, Factors]:
    """What stands in the model after one more edit, which the next ones do not move."""
    made = {name: Factors(f.u.detach(), f.v.detach()) for name, f in factors.items()}
    if earlier is None:
        return made
    return {name: stacked(earlier[name], f) for name, f in made.items()}
