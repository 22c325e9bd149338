# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Takes knowledge out of a model by subtracting the task vector that taught it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_edit.core.change import LowRank
from lightning_edit.core.delta import SURVIVAL_WARNING, WeightDelta
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.plain_model import check_weight
from lightning_edit.core.sharding import local_shard, reshard, shard_like
from lightning_edit.core.wrappers import plain_names
from lightning_edit.forgetting.adapter_vectors import load_adapter
from lightning_edit.functional.task_vector import forget, surviving_share

__all__ = ["check_rate", "forget_", "load_task_vector", "sweep_forgetting"]


def load_task_vector(folder: str | Path, model: nn.Module) -> WeightDelta:
    """Reads a task vector: a saved `WeightDelta`, or a LoRA adapter as peft saves it.

    Args:
        folder: Holds ``delta_config.json`` or ``adapter_config.json``.
        model: The language model it is for.

    Returns:
        The vector; that of an adapter as low-rank factors.

    Raises:
        ArtifactError: If the folder holds neither, is damaged, or does not fit the model.
    """
    folder = Path(folder)
    if (folder / "delta_config.json").is_file():
        vector = WeightDelta.load(folder)
    elif (folder / "adapter_config.json").is_file():
        vector = load_adapter(folder, model)
    else:
        what = "has neither" if folder.is_dir() else "does not exist, so there is neither"
        raise ArtifactError(
            f"`{folder}` {what} `delta_config.json` (a task vector of this package) nor "
            "`adapter_config.json` (a LoRA adapter of peft). Learn the old knowledge first, with "
            "the callback `SaveTaskVector`, and name its folder."
        )
    _targets(model, vector)
    return vector


@torch.no_grad()
def forget_(
    model: nn.Module,
    vector: WeightDelta,
    rate: float,
    originals: Mapping[str, Tensor] | None = None,
) -> None:
    """θ ← θ − λ τ, in place; θ + λ τ for a negative rate.

    In float32, rounded once, one parameter at a time, and on a sharded model shard by shard. A
    weight under a LoRA layer is changed beneath the adapter.

    Args:
        model: A language model, with or without LoRA layers.
        vector: τ, by the plain model's parameter names.
        rate: λ, the forgetting rate.
        originals: Parameter name to the local shard of θ, where the model holds something else.

    Raises:
        ArtifactError: If the model lacks a parameter or stores it in another shape. Nothing has
            been written then.

    Warns:
        UserWarning: If rounding to the weights' dtype swallows a part of the change.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> before = layer.weight.tolist()
        >>> tau = WeightDelta({"weight": torch.ones(1, 2)})
        >>> forget_(layer, tau, rate=0.5)
        >>> torch.allclose(layer.weight, torch.tensor(before) - 0.5)
        True

    References:
        Forgetting before Learning, arXiv 2311.08011.
    """
    written = wanted = 0.0
    for name, parameter in _targets(model, vector).items():
        weight = local_shard(parameter)
        change = vector.changes[name]
        if isinstance(change, LowRank):
            tau = change.u.to(weight.device) @ change.v.to(weight.device).mT
        else:
            tau = change.to(weight.device)
        tau = shard_like(parameter, tau)
        before = weight if originals is None else originals[name].to(weight.device)
        after = forget(before, tau, rate)
        if weight.dtype != torch.float32 and rate:
            share = surviving_share(before, after, -rate * tau)
            written, wanted = written + float(share[0]), wanted + float(share[1])
        weight.copy_(after)
    if wanted and written / wanted < SURVIVAL_WARNING:
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        warnings.warn(
            f"Only {written / wanted:.0%} of what was to be forgotten survives rounding to "
            f"{dtype}. Load the model with dtype float32.",
            UserWarning,
            stacklevel=2,
        )


@torch.no_grad()
def sweep_forgetting(
    model: nn.Module,
    vector: WeightDelta,
    rates: Iterable[float],
    evaluate: Callable[[], Mapping[str, float]],
) -> list[dict[str, float]]:
    """Measures the model at several forgetting rates of one task vector, without any training.

    Args:
        model: θ; it comes back as it was, bit for bit, even after an error.
        vector: τ, the task vector of the old knowledge.
        rates: Values of λ.
        evaluate: Measures the model as it stands.

    Returns:
        For each rate a row: ``rate`` and what ``evaluate`` returned.

    Raises:
        ArtifactError: If the vector does not fit the model.
        ValueError: If a rate is not finite.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(layer.weight)
        >>> tau = WeightDelta({"weight": torch.ones(1, 2)})
        >>> rows = sweep_forgetting(
        ...     layer, tau, [0.0, 0.5], lambda: {"sum": float(layer.weight.sum())}
        ... )
        >>> rows
        [{'rate': 0.0, 'sum': 2.0}, {'rate': 0.5, 'sum': 1.0}]
    """
    rates = [check_rate(rate) for rate in rates]
    parameters = _targets(model, vector)
    originals = {name: local_shard(p).clone() for name, p in parameters.items()}
    rows = []
    try:
        for rate in rates:
            forget_(model, vector, rate, originals)
            rows.append({"rate": rate, **evaluate()})
    finally:
        for name, parameter in parameters.items():
            local_shard(parameter).copy_(originals[name])
    return rows


def check_rate(rate: float) -> float:
    """The rate, if it is a finite number.

    Raises:
        ValueError: If it is not.
    """
    if not math.isfinite(rate):
        raise ValueError(f"`rate` is expected to be a finite number, but got {rate}.")
    return float(rate)


def _targets(model: nn.Module, vector: WeightDelta) -> dict[str, nn.Parameter]:
    """The parameters that a vector changes, by its names."""
    reshard(model)
    names = plain_names(model)
    named = dict(model.named_parameters())
    origin = vector.provenance.base.id or "another model"
    for name, change in vector.changes.items():
        if name not in names:
            raise ArtifactError(
                f"The task vector changes `{name}`, which the model does not have. It was made for "
                f"{origin}: give one that was learned from this model."
            )
        parameter = named[names[name]]
        check_weight(name, parameter, type(model).__name__)
        if parameter.shape != change.shape or not parameter.is_floating_point():
            raise ArtifactError(
                f"The task vector is for `{name}` of the shape {list(change.shape)}, but the "
                f"model stores {list(parameter.shape)} ({parameter.dtype}). It was made for "
                f"{origin}: give one that was learned from this model, unquantized."
            )
    return {name: named[names[name]] for name in vector.changes}
