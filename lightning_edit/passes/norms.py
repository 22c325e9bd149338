# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Norms of models as one kernel each, where their authors wrote them as seven."""

# Shapes: D hidden.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from lightning_edit.core.sharding import is_sharded
from lightning_edit.passes.blocks import running

__all__ = ["fused", "fused_norms"]

SAMPLE_ROWS = 8
# Relative difference that rounding accounts for, in float32 and in half precision.
EXACT, ROUNDED = 1e-4, 2e-2


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """Context manager: on a GPU, RMS norms of a model are run by PyTorch's kernel.

    A model's own takes a kernel for each operation, and keeps two copies in float32 for the way
    back, so that norms would take a third of the time of its matrix products.

    Args:
        model: The model. A norm that does something else, by trying, is left as it is.
    """
    device = next(model.parameters()).device
    if device.type != "cuda" or is_sharded(model):
        yield
        return
    with running(fused(model)):
        yield


@torch.no_grad()
def fused(model: nn.Module) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """What to run in place of each RMS norm of a model, where it gives the same.

    Args:
        model: The model; one norm of each kind is tried.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> len(fused(tiny_model()))  # two of each block, and the last
        9
    """
    instead: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    known: dict[tuple[type[nn.Module], float, torch.Size], bool] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        is_named = type(module).__name__.endswith("RMSNorm")
        if not (is_named and isinstance(weight, nn.Parameter) and isinstance(eps, float)):
            continue
        kind = (type(module), eps, weight.shape)
        run = _run(weight, eps)
        if kind not in known:
            sample = torch.linspace(-2, 3, SAMPLE_ROWS * weight.numel(), device=weight.device)
            sample = sample.reshape(SAMPLE_ROWS, -1).to(weight.dtype)
            own = module(sample)
            error = (run(sample) - own).norm() / own.norm()
            limit = EXACT if weight.dtype == torch.float32 else ROUNDED
            known[kind] = own.dtype == sample.dtype and bool(error < limit)
        if known[kind]:
            instead[module] = run
    return instead


def _run(weight: nn.Parameter, eps: float) -> Callable[[Tensor], Tensor]:
    return lambda states: rms_norm(states, weight.shape, weight, eps)
