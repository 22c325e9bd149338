# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Sequences of edits: what is kept of the earlier ones, and how many a model can hold.

All functions read a retention matrix R of shape [S, K]: ``R[s, k]`` is the reliability of edit k
(in [0, 1]) measured after ``steps[s]`` edits. Entries of edits not yet made at that time
(k >= steps[s]) are never read and may be nan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "average_retention",
    "early_retention",
    "edits_held",
    "forgetting",
    "retention_area",
    "retention_by_age",
]


def average_retention(retention: Tensor, steps: Sequence[int] | None = None) -> Tensor:
    """Mean reliability of all edits made so far, A_t = 1/t Σ_{k ≤ t} R(t, k).

    Args:
        retention: Retention matrix, shape [S, K].
        steps: Number of edits made at each row, rising, at most K; 1, 2, … S when left out.

    Returns:
        Float64 tensor of shape [S].

    Raises:
        ValueError: If shapes and steps do not fit, or an entry that counts is nan.

    Examples:
        >>> average_retention(torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        tensor([1.0000, 0.7500], dtype=torch.float64)
    """
    values, made, counts = _checked(retention, steps)
    return torch.where(made, values, 0).sum(dim=1) / counts


def forgetting(retention: Tensor, steps: Sequence[int] | None = None) -> Tensor:
    r"""Mean loss of reliability since each edit's best moment.

    .. math:: F_t = \frac1t \sum_{k \le t} \Big[ \max_{k \le s \le t} R(s, k) - R(t, k) \Big]

    Args:
        retention: Retention matrix, shape [S, K].
        steps: Number of edits made at each row, rising, at most K; 1, 2, … S when left out.

    Returns:
        Float64 tensor of shape [S], each in [0, 1].

    Raises:
        ValueError: If shapes and steps do not fit, or an entry that counts is nan.

    Examples:
        >>> forgetting(torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        tensor([0.0000, 0.2500], dtype=torch.float64)
    """
    values, made, counts = _checked(retention, steps)
    best = torch.where(made, values, -math.inf).cummax(dim=0).values
    return torch.where(made, best - values, 0).sum(dim=1) / counts


def early_retention(retention: Tensor, m: int, steps: Sequence[int] | None = None) -> float:
    """Mean reliability of the first m edits at the end of the sequence.

    Args:
        retention: Retention matrix, shape [S, K].
        m: How many of the first edits to look at.
        steps: Number of edits made at each row, rising, at most K; 1, 2, … S when left out.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If shapes and steps do not fit, an entry that counts is nan, or fewer than m
            edits were made.

    Examples:
        >>> early_retention(torch.tensor([[1.0, 0.0], [0.5, 1.0]]), m=1)
        0.5
    """
    values, _, counts = _checked(retention, steps)
    if not 1 <= m <= int(counts[-1]):
        raise ValueError(
            f"`m` is expected to lie between 1 and the {int(counts[-1])} edits made, but got {m}."
        )
    return float(values[-1, :m].mean())


def retention_by_age(retention: Tensor, steps: Sequence[int] | None = None) -> Tensor:
    """Mean reliability of an edit when it is a edits old, 1/n Σ_t R(t, t − a).

    The sum is over the n rows after which there is an edit of that age; the newest has the age 0.

    Args:
        retention: Retention matrix, shape [S, K].
        steps: Number of edits made at each row, rising, at most K; 1, 2, … S when left out.

    Returns:
        Float64 tensor of as many entries as edits were made in the end.

    Raises:
        ValueError: If shapes and steps do not fit, or an entry that counts is nan.

    Examples:
        >>> retention_by_age(torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    values, made, counts = _checked(retention, steps)
    ages = counts[:, None] - 1 - torch.arange(values.shape[1])
    most = int(counts[-1])
    sums = torch.zeros(most, dtype=torch.float64).index_add(0, ages[made], values[made])
    return sums / torch.bincount(ages[made], minlength=most)


def edits_held(
    average: Tensor,
    threshold: float,
    capability_drop: Tensor | None = None,
    max_drop: float = 0.0,
    steps: Sequence[int] | None = None,
) -> int:
    """How many edits the model holds: max {t : A_t ≥ τ, drop_t ≤ δ}.

    Args:
        average: Average retention A_t, shape [S] (see
            [`average_retention`][lightning_edit.functional.average_retention]).
        threshold: The retention τ demanded, in [0, 1].
        capability_drop: Loss of general ability at each row, in the unit of ``max_drop``, shape
            [S]; not looked at when left out.
        max_drop: The loss δ allowed.
        steps: Number of edits made at each row, rising; 1, 2, … S when left out.

    Returns:
        The largest number of edits at which both conditions hold; 0 if there is none.

    Raises:
        ValueError: If the shapes and steps do not fit.

    Examples:
        >>> edits_held(torch.tensor([1.0, 0.9, 0.4]), threshold=0.8)
        2
        >>> drop = torch.tensor([0.0, 0.2, 0.3])
        >>> edits_held(torch.tensor([1.0, 0.9, 0.4]), 0.8, capability_drop=drop, max_drop=0.1)
        1
    """
    counts = _checked_steps(average, steps)
    held = average >= threshold
    if capability_drop is not None:
        if capability_drop.shape != average.shape:
            raise ValueError(
                "`capability_drop` is expected to have the shape of `average`, "
                f"{tuple(average.shape)}, but got {tuple(capability_drop.shape)}."
            )
        held = held & (capability_drop <= max_drop).to(held.device)
    return max((count for count, ok in zip(counts, held.tolist(), strict=True) if ok), default=0)


def retention_area(average: Tensor, steps: Sequence[int] | None = None) -> float:
    """Mean of the average retention over the logarithm of the number of edits.

    The area under the curve on a logarithmic axis, by trapezoids, divided by the axis's length;
    so late edits, which are many, do not drown the first ones.

    Args:
        average: Average retention, shape [S] (see
            [`average_retention`][lightning_edit.functional.average_retention]).
        steps: Number of edits made at each row, rising; 1, 2, … S when left out.

    Returns:
        A number in [0, 1]; the single value if there is one row only.

    Raises:
        ValueError: If the shapes and steps do not fit.

    Examples:
        >>> retention_area(torch.tensor([1.0, 0.5, 0.0]), steps=[1, 10, 100])
        0.5
    """
    counts = _checked_steps(average, steps)
    values = average.double().cpu()
    if len(counts) == 1:
        return float(values[0])
    axis = torch.tensor(counts, dtype=torch.float64).log()
    return float(torch.trapezoid(values, axis) / (axis[-1] - axis[0]))


def _checked(retention: Tensor, steps: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix in float64, where it counts [S, K], and the number of edits made [S]."""
    if retention.ndim != 2:
        raise ValueError(
            f"`retention` is expected to have the shape [S, K], but got {tuple(retention.shape)}."
        )
    counts = torch.tensor(_checked_steps(retention, steps))
    if counts[-1] > retention.shape[1]:
        raise ValueError(
            f"`steps` names {int(counts[-1])} edits, but `retention` has columns for "
            f"{retention.shape[1]}."
        )
    values = retention.double().cpu()
    made = torch.arange(retention.shape[1]) < counts[:, None]
    if values[made].isnan().any():
        raise ValueError("`retention` is nan for edits that were already made. Measure them all.")
    return values, made, counts


def _checked_steps(rows: Tensor, steps: Sequence[int] | None) -> list[int]:
    size = rows.shape[0] if rows.ndim else 0
    counts = list(range(1, size + 1)) if steps is None else [int(step) for step in steps]
    rising = all(a < b for a, b in pairwise(counts))
    if not counts or len(counts) != size or counts[0] < 1 or not rising:
        raise ValueError(
            f"`steps` is expected to hold one rising number of edits for each of the {size} rows, "
            f"but got {counts}."
        )
    return counts
