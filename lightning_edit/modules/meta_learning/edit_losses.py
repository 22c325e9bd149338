# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Losses of edits while they act on a model, and the gradient of these losses at the edits."""

# Shapes: G edits, O outputs and I inputs of a projection, N tokens, V vocabulary.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_edit.core.batch import IGNORE_INDEX
from lightning_edit.core.locator import ModelTree, WeightSite
from lightning_edit.functional.metrics import kl_divergence
from lightning_edit.modules.meta_learning.factors import Factors, Positions, edited
from lightning_edit.modules.meta_learning.training_batch import GroupedRequests, shared_weights
from lightning_edit.passes.gradient_passes import output_below, skipped
from lightning_edit.passes.target_loss import all_places, place_logits, target_places

__all__ = ["EditLosses", "edit_losses"]


@dataclass(frozen=True)
class EditLosses:
    """How edits do: this process's part of the mean over edits of the mean over tokens.

    Args:
        edit: Loss of the new answers, a scalar.
        kl: KL(unedited ‖ edited) on the locality probes, a scalar.
        gradients: Of their weighted sum with respect to u and v of each site in turn.
    """

    edit: Tensor
    kl: Tensor
    gradients: list[Tensor]


def edit_losses(
    tree: ModelTree,
    sites: Sequence[WeightSite],
    asked: GroupedRequests,
    factors: Mapping[str, Factors],
    *,
    token_loss: Callable[[Tensor, Tensor], Tensor],
    weights: tuple[float, float],
    positions: Positions,
    size: int,
    earlier: Mapping[str, Factors] | None = None,
) -> EditLosses:
    """Reads the losses of edits in passes, and their gradient.

    Args:
        tree: The model; it stays as it is.
        sites: The edited projections.
        asked: The requests, and which of them this process runs.
        factors: Edits [G, n, O] and [G, n, I] by the parameter's name.
        token_loss: Loss of each token, [N], from logits [N, V] and tokens [N].
        weights: Of the loss of the new answers and of the divergence.
        positions: Whether the divergence is taken at ``all`` tokens or at those of ``answers``.
        size: Requests in a pass.
        earlier: An edit that was made before, and acts as well.
    """
    batch, groups = asked.batch, asked.groups
    leaves = {
        name: Factors(*(t.detach().requires_grad_(t.requires_grad) for t in (f.u, f.v)))
        for name, f in factors.items()
    }
    flat = [t for found in leaves.values() for t in (found.u, found.v)]
    learned = [t for t in flat if t.requires_grad]
    totals = {id(t): torch.zeros_like(t) for t in flat}
    owners = torch.tensor(batch.outer_owners, device=groups.device)
    outer_weights = shared_weights(batch.outer.labels != IGNORE_INDEX, groups[owners])
    mask = batch.locality.attention_mask.bool()
    if positions == "answers" or tree.is_encoder_decoder:
        mask = batch.locality.labels != IGNORE_INDEX
    locality_weights = shared_weights(mask, groups)
    edit = torch.zeros((), device=groups.device)
    divergence = torch.zeros((), device=groups.device)
    places = all_places if positions == "all" else target_places
    for start in range(0, len(asked.mine), size):
        chosen = list(asked.mine[start : start + size])
        probes = batch.locality.select(chosen)
        where = places(tree, probes)
        with torch.no_grad(), output_below(tree, sites) as below:
            before = place_logits(tree, probes, where)
        if tree.is_encoder_decoder:  # what its decoder attends to may be edited, too
            below = {}
        with edited(tree.model, sites, earlier):
            with edited(tree.model, sites, leaves, groups[chosen]), skipped(below):
                after = place_logits(tree, probes, where)
            rows = [i for i, owner in enumerate(batch.outer_owners) if owner in set(chosen)]
            outer = batch.outer.select(rows)
            with edited(tree.model, sites, leaves, groups[owners[rows]]):
                logits = place_logits(tree, outer, target_places(tree, outer))
        shares = locality_weights[chosen][mask[chosen]] / asked.count
        kl = (shares * kl_divergence(before, after)).sum()
        is_target = outer.labels != IGNORE_INDEX
        losses = token_loss(logits, outer.labels[is_target])
        nll = (outer_weights[rows][is_target] / asked.count * losses).sum()
        edit, divergence = edit + nll.detach(), divergence + kl.detach()
        if learned:
            loss = weights[0] * nll + weights[1] * kl
            for leaf, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
                totals[id(leaf)] += gradient
    return EditLosses(edit, divergence, [totals[id(t)] for t in flat])
