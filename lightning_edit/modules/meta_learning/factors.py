# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What enters edited projections, the gradients at their outputs, and passes with edits acting.

Weights get no gradient and are never written: a gradient is taken at the output of a projection,
and an edit u vᵀ adds (x v) uᵀ to that output.
"""

# Shapes: B requests, T positions, N tokens of all requests, I inputs and O outputs of a projection,
# G edits, n factors of an edit.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from lightning_edit.core.batch import IGNORE_INDEX, EditBatch
from lightning_edit.core.change import Change, LowRank
from lightning_edit.core.locator import ModelTree, WeightSite
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest
from lightning_edit.core.sharding import own_outputs, plain, whole_outputs
from lightning_edit.passes.gradient_passes import recorded
from lightning_edit.passes.hooks import hooked
from lightning_edit.passes.target_loss import row_means, target_nll, target_places

__all__ = [
    "FactorRows",
    "Factors",
    "Gradients",
    "Positions",
    "as_change",
    "capture",
    "edited",
    "grouped",
    "stacked",
]

Positions = Literal["all", "answers"]


@dataclass(frozen=True)
class FactorRows:
    """Factors of a projection's gradient: Σ d uᵀ over rows is the gradient of its weight.

    Args:
        inputs: u, [N, I] float32.
        gradients: d, [N, O] float32.
        requests: The request that each row belongs to, [N] int64.
    """

    inputs: Tensor
    gradients: Tensor
    requests: Tensor

    def divided(self, divisor: float) -> Self:
        """The same of a loss that is divided by a number."""
        return replace(self, gradients=self.gradients / divisor)

    def joined(self, processes: Processes) -> Self:
        """The rows of all processes, in the order of their requests."""
        if processes.count == 1:
            return self
        parts = [processes.joined(rows) for rows in (self.inputs, self.gradients, self.requests)]
        order = torch.argsort(parts[2], stable=True)
        return type(self)(*(part[order] for part in parts))


@dataclass(frozen=True)
class Factors:
    """Edits of one projection, ΔW = u vᵀ each; short ones are filled up with zeros.

    Args:
        u: [G, n, O].
        v: [G, n, I].
    """

    u: Tensor
    v: Tensor


@dataclass(frozen=True)
class Gradients:
    """What a network makes edits of: the gradients of requests, and which edit answers each.

    Args:
        rows: Factors by the parameter's name.
        requests: The requests.
        groups: The edit that each request belongs to, [len(requests)] int64.
        count: G, the number of edits.
        tokens: Target tokens of all requests.
        processes: Those that have such rows, all of which statistics take in; None outside
            training, when statistics stay as they are.
    """

    rows: Mapping[str, FactorRows]
    requests: Sequence[EditRequest]
    groups: Tensor
    count: int
    tokens: int
    processes: Processes | None


def capture(
    tree: ModelTree,
    sites: Sequence[WeightSite],
    batch: EditBatch,
    weights: Tensor,
    *,
    chosen: Sequence[int],
    size: int,
    positions: Positions = "all",
) -> tuple[dict[str, FactorRows], dict[int, float]]:
    """Takes the factors of the gradient of Σ weight · NLL at projections.

    Args:
        tree: A decoder-only or encoder-decoder model.
        sites: Projections.
        batch: Prompts and targets.
        weights: How much each target token counts, [B, T] float32.
        chosen: Places in the batch to run.
        size: Requests in a pass.
        positions: Rows of ``all`` tokens whose input and gradient are not zero, or of the places
            where ``answers`` are predicted; an encoder has no such places and gives all its rows.

    Returns:
        Rows by the parameter's name, and the mean loss of each chosen request.
    """
    parts: dict[str, list[FactorRows]] = {site.name: [] for site in sites}
    losses: dict[int, float] = {}
    decoder = tuple(f"{name}." for name in tree.block_names)
    for start in range(0, len(chosen), size):
        places = list(chosen[start : start + size])
        part = batch.select(places)
        is_target = part.labels != IGNORE_INDEX
        with recorded(tree.model, sites) as seen:
            nll = target_nll(tree, part)
        loss = (weights[places][is_target] * nll).sum()
        gradients = torch.autograd.grad(loss, [seen[site.name][1] for site in sites])
        at = target_places(tree, part)
        numbers = torch.tensor(places, device=nll.device)
        for site, gradient in zip(sites, gradients, strict=True):
            inputs = seen[site.name][0].reshape(len(part), -1, site.in_features)
            gradient = whole_outputs(site.parameter(tree.model), gradient)
            gradient = gradient.reshape(len(part), -1, site.out_features)
            where = at
            if positions == "all" or not site.name.startswith(decoder):
                found, columns = torch.nonzero(gradient.any(2) & inputs.any(2), as_tuple=True)
                where = (found, columns)
            parts[site.name].append(
                FactorRows(inputs[where].float(), gradient[where].float(), numbers[where[0]])
            )
        means = row_means(nll.detach(), part.labels).tolist()
        losses |= dict(zip(places, means, strict=True))
    device = batch.input_ids.device
    nothing = {
        site.name: FactorRows(
            torch.zeros(0, site.in_features, device=device),
            torch.zeros(0, site.out_features, device=device),
            torch.zeros(0, dtype=torch.long, device=device),
        )
        for site in sites
    }
    return {
        name: FactorRows(
            torch.cat([row.inputs for row in rows]),
            torch.cat([row.gradients for row in rows]),
            torch.cat([row.requests for row in rows]),
        )
        if rows
        else nothing[name]
        for name, rows in parts.items()
    }, losses


def grouped(u: Tensor, v: Tensor, groups: Tensor, count: int) -> Factors:
    """Sorts rows of factors into edits.

    Args:
        u: [N, O].
        v: [N, I].
        groups: The edit that each row belongs to, [N] int64.
        count: G, the number of edits.

    Examples:
        >>> found = grouped(torch.ones(3, 2), torch.ones(3, 1), torch.tensor([1, 0, 1]), 2)
        >>> found.u[:, :, 0].tolist()
        [[1.0, 0.0], [1.0, 1.0]]
    """
    if count == 1:
        return Factors(u[None], v[None])
    order = torch.argsort(groups, stable=True)
    sizes = torch.bincount(groups, minlength=count)
    starts = torch.cumsum(sizes, 0) - sizes
    sorted_groups = groups[order]
    within = torch.arange(len(groups), device=groups.device) - starts[sorted_groups]
    width = max(int(sizes.max()), 1)
    places = (sorted_groups, within)
    return Factors(
        u.new_zeros(count, width, u.shape[1]).index_put(places, u[order]),
        v.new_zeros(count, width, v.shape[1]).index_put(places, v[order]),
    )


@contextmanager
def edited(
    model: nn.Module,
    sites: Sequence[WeightSite],
    factors: Mapping[str, Factors] | None,
    edits: Tensor | None = None,
) -> Iterator[None]:
    """Context manager: edits act on the outputs of projections.

    Args:
        model: The model; its weights stay as they are.
        sites: Projections.
        factors: Edits by the parameter's name, to which gradients flow; None for no edit.
        edits: For each row of the passes to come, which edit acts on it, [B] int64; the only one
            there is when None.
    """
    if factors is None:
        yield
        return

    def added(one: Factors) -> Callable[..., Tensor]:
        u, v = one.u, one.v
        if edits is not None and len(u) > 1:
            u, v = u[edits], v[edits]

        def add(projection: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows = plain(args[0]).to(v.dtype)
            # Some models flatten rows and positions before a projection.
            rows = rows.reshape(len(v), -1, v.shape[2])
            change = own_outputs(projection, (rows @ v.mT) @ u)
            return output + change.reshape(output.shape).to(output.dtype)

        return add

    with hooked({site.module(model): added(factors[site.name]) for site in sites}):
        yield


def stacked(one: Factors, other: Factors) -> Factors:
    """Edits that add up: the factors of both."""
    return Factors(torch.cat([one.u, other.u], 1), torch.cat([one.v, other.v], 1))


def as_change(site: WeightSite, u: Tensor, v: Tensor) -> Change:
    """An edit in the parameter's own layout, in the form that takes less room.

    Args:
        site: The projection.
        u: [n, O].
        v: [n, I].

    Returns:
        Factors while 2 n is at most the smaller side of W, and from there on ΔW itself.
    """
    u, v = u.detach().float().T.contiguous(), v.detach().float().T.contiguous()
    if 2 * u.shape[1] <= min(site.in_features, site.out_features):
        return LowRank(v, u) if site.transposed else LowRank(u, v)
    return site.orient(u @ v.T).contiguous()
