# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Gradients at the outputs of projections, at target tokens alone and without those of weights."""

# Shapes: N target tokens of all requests, I inputs and O outputs of a projection.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_edit.core.batch import IGNORE_INDEX, EditBatch
from lightning_edit.core.locator import ModelTree, WeightSite
from lightning_edit.core.sharding import plain, whole_outputs
from lightning_edit.passes.blocks import running
from lightning_edit.passes.hooks import hooked
from lightning_edit.passes.target_loss import row_means, target_nll

__all__ = [
    "GradientPass",
    "gradient_passes",
    "output_below",
    "recorded",
    "skipped",
]


@dataclass(frozen=True)
class GradientPass:
    """What one pass over some requests of a batch left.

    Args:
        chosen: Their places in the batch, n of them.
        taken: Inputs [t, I] and gradients at outputs [t, O] at their t target tokens, by the
            parameter's name.
        losses: Mean loss of each request.
    """

    chosen: list[int]
    taken: dict[str, tuple[Tensor, Tensor]]
    losses: list[float]


def gradient_passes(
    tree: ModelTree, sites: Sequence[WeightSite], batch: EditBatch, size: int, divisor: float
) -> tuple[list[GradientPass], Tensor]:
    """Runs a batch in passes and takes what enters projections, and the gradients at their outputs.

    The gradient is that of the sum of the losses of target tokens over a divisor, so that no
    request's depends on those beside it in a pass. Weights take no part in it: those of the
    projections are frozen here, and it is for the caller to give them their flags back.

    Args:
        tree: A decoder-only or encoder-decoder model.
        sites: Projections.
        batch: Prompts and targets.
        size: Requests in a pass; they are sorted by length.
        divisor: What the loss is divided by.

    Returns:
        The passes, and the order in which their tokens follow the batch's labels, [N] int64.
    """
    lengths = batch.attention_mask.sum(1)
    by_length: list[int] = torch.argsort(lengths, stable=True).tolist()
    is_target = batch.labels != IGNORE_INDEX
    numbers = torch.full_like(batch.labels, -1)
    numbers[is_target] = torch.arange(int(is_target.sum()), device=numbers.device)
    passes, places = [], []
    for start in range(0, len(batch), size):
        chosen = by_length[start : start + size]
        part = batch.select(chosen)
        with recorded(tree.model, sites) as seen:
            nll = target_nll(tree, part)
        outputs = [seen[site.name][1] for site in sites]
        gradients = torch.autograd.grad(nll.sum() / divisor, outputs)
        rows, columns = torch.nonzero(part.labels != IGNORE_INDEX, as_tuple=True)
        at = columns if tree.is_encoder_decoder else columns - 1
        taken = {}
        for site, gradient in zip(sites, gradients, strict=True):
            inputs = seen[site.name][0]
            whole = whole_outputs(site.parameter(tree.model), gradient)
            taken[site.name] = (
                inputs.reshape(len(part), -1, site.in_features)[rows, at].float(),
                whole.reshape(len(part), -1, site.out_features)[rows, at].float(),
            )
        losses = row_means(nll.detach(), part.labels).tolist()
        passes.append(GradientPass(chosen, taken, losses))
        places.append(numbers[chosen][rows, columns])
    return passes, torch.argsort(torch.cat(places))


@contextmanager
def recorded(
    model: nn.Module, sites: Sequence[WeightSite]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Context manager: records inputs and outputs of projections, by the parameter's name.

    The outputs alone take part in the gradient.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str) -> Callable[..., Tensor]:
        def take(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output.requires_grad_(True)
            seen[name] = (plain(args[0]).detach(), output)
            # A copy goes on, since some models (Falcon) add to the output in place.
            return output.clone()

        return take

    for site in sites:
        site.parameter(model).requires_grad_(False)
    with hooked({site.module(model): record(site.name) for site in sites}):
        yield seen


@contextmanager
def output_below(tree: ModelTree, sites: Sequence[WeightSite]) -> Iterator[dict[nn.Module, object]]:
    """Context manager: records what the block below the edited ones returns, for all below."""
    below = tree.blocks[: min(site.layer for site in sites)]
    seen: dict[nn.Module, object] = {}

    def record(_: nn.Module, __: object, output: object) -> None:
        seen.update(dict.fromkeys(below, output))

    with hooked(dict.fromkeys(below[-1:], record)):
        yield seen


@contextmanager
def skipped(below: dict[nn.Module, object]) -> Iterator[None]:
    """Context manager: blocks return what is given, without being run."""
    with running({block: lambda *_, o=output, **__: o for block, output in below.items()}):
        yield
