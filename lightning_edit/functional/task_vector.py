# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Task vectors of single tensors: what tuning changed, and how to take it out again.

All arithmetic is in float32 and elementwise, so it holds for a shard of a tensor as for the whole.
"""

# Shapes: B facts.

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "forget",
    "forget_learned",
    "forgetting_importance",
    "old_answer_residual",
    "surviving_share",
    "task_vector",
]


def task_vector(base: Tensor, tuned: Tensor) -> Tensor:
    """τ = θ_tuned − θ.

    Args:
        base: θ, any shape and floating dtype.
        tuned: θ after tuning, of the same shape.

    Returns:
        τ, float32.

    Raises:
        ValueError: If the shapes differ.

    Examples:
        >>> task_vector(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0])).tolist()
        [0.5, 0.0]

    References:
        Editing Models with Task Arithmetic, arXiv 2212.04089, section 2.
    """
    _check_shapes(base=base, tuned=tuned)
    return tuned.float() - base.float()


def forget(theta: Tensor, tau: Tensor, rate: float) -> Tensor:
    """θ' = θ − λ τ.

    Args:
        theta: θ, any shape and floating dtype.
        tau: Task vector of the knowledge to forget, of the same shape.
        rate: λ, the forgetting rate; 0 changes nothing.

    Returns:
        θ', rounded once to the dtype of θ.

    Raises:
        ValueError: If the shapes differ.

    Examples:
        >>> forget(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]), rate=2.0).tolist()
        [0.0, 2.0]

    References:
        Forgetting before Learning, arXiv 2311.08011.
    """
    _check_shapes(theta=theta, tau=tau)
    return (theta.float() - rate * tau.float()).to(theta.dtype)


def forget_learned(base: Tensor, tuned: Tensor, rate: float) -> Tensor:
    """θ' = (1 + λ) θ − λ θ_tuned: learn the old knowledge, then go as far the other way.

    Computed as θ − λ (θ_tuned − θ), which is the same and rounds off less.

    Args:
        base: θ before the old knowledge was learned, any shape and floating dtype.
        tuned: θ after, of the same shape.
        rate: λ, the forgetting rate.

    Returns:
        θ', in the dtype of θ.

    Raises:
        ValueError: If the shapes differ.

    Examples:
        >>> forget_learned(torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0]), rate=1.0).tolist()
        [0.5, 2.0]
    """
    return forget(base, task_vector(base, tuned), rate)


def forgetting_importance(forget: Tensor, retain: Tensor, alpha: float = 1.0) -> Tensor:
    """S = F_forget / (F_forget + α F_retain): how much of a forgetting rate each parameter gets.

    Args:
        forget: Diagonal of the Fisher information of what is to be forgotten, any shape.
        retain: The same of what is to be kept, of the same shape.
        alpha: α, how much the latter counts; 0 spares nothing.

    Returns:
        s, in [0, 1], float32: 1 where only what is to be forgotten depends on a parameter, 1/2
        where both do alike (for α = 1), 0 where it does not matter to what is to be forgotten.

    Raises:
        ValueError: If the shapes differ, or α is negative.

    Examples:
        >>> forgetting_importance(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 1.0]))
        tensor([1.0000, 0.5000, 0.0000])

    References:
        The mechanism of per-parameter task arithmetic, arXiv 2601.22030, by Fisher diagonals.
    """
    _check_shapes(forget=forget, retain=retain)
    if alpha < 0:
        raise ValueError(f"`alpha` is expected to be 0 or more, but got {alpha}.")
    wanted = forget.float()
    whole = wanted + alpha * retain.float()
    return torch.where(wanted > 0, wanted / whole, 0.0)


def surviving_share(before: Tensor, after: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """How much of a wanted change is in the weights after rounding: ⟨after − before, w⟩ / ⟨w, w⟩.

    Returned as two sums, so that tensors or shards can be added up before dividing.

    Args:
        before: Weights before, any shape.
        after: Weights after, of the same shape.
        wanted: w, the change that was to be made, of the same shape.

    Returns:
        Numerator and denominator, float64 scalars.

    Examples:
        >>> before = torch.tensor([1.0, 1.0], dtype=torch.bfloat16)
        >>> wanted = torch.tensor([0.001, 0.001])
        >>> written, whole = surviving_share(before, (before + wanted).bfloat16(), wanted)
        >>> float(written / whole)
        0.0
    """
    moved = after.float() - before.float()
    return (moved * wanted).sum(dtype=torch.float64), wanted.square().sum(dtype=torch.float64)


def old_answer_residual(p_now: Tensor, p_before: Tensor) -> Tensor:
    """What is left of the old answers: the mean of P_now(y°|x) / P_before(y°|x).

    Args:
        p_now: Probability of each old answer now, in [0, 1], [B].
        p_before: The same of the model that knew them, in (0, 1], [B].

    Returns:
        Float64 scalar: 1 when nothing is forgotten, 0 when everything is; above 1 when the old
        answers became likelier.

    Raises:
        ValueError: If the shapes differ, there is no fact, or a probability before is not positive.

    Examples:
        >>> float(old_answer_residual(torch.tensor([0.25, 0.0]), torch.tensor([0.5, 0.9])))
        0.25
    """
    _check_shapes(p_now=p_now, p_before=p_before)
    if p_now.numel() == 0:
        raise ValueError("There is no old answer to measure. Give at least one.")
    if not bool((p_before > 0).all()):
        raise ValueError(
            "`p_before` is expected to be positive, but an old answer has the probability "
            f"{float(p_before.min())}. Leave out the facts that the model never knew."
        )
    return (p_now.double() / p_before.double()).mean()


def _check_shapes(**tensors: Tensor) -> None:
    (first, a), (second, b) = tensors.items()
    if a.shape != b.shape:
        raise ValueError(
            f"`{second}` is expected to have the shape of `{first}`, {list(a.shape)}, but has "
            f"{list(b.shape)}."
        )
