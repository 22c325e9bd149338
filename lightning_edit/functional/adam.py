# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Steps of many searches at once, each within a ball of its own."""

# Shapes: E searches, D dimensions of each; further axes between them are searches within one.

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["adam_step", "clamp_norm"]

# Adam's defaults.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def adam_step(
    gradient: Tensor, first: Tensor, second: Tensor, step: int, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Adam.

    Args:
        gradient: Of each search, [E, ..., D].
        first: Running mean of gradients, the same shape; 0 before the first step.
        second: Running mean of their squares.
        step: Which step this is, from 0.
        lr: Learning rate.

    Returns:
        What is added to where the searches stand, and both means.

    Examples:
        >>> zero = torch.zeros(1, 2)
        >>> move, _, _ = adam_step(torch.tensor([[3.0, -0.1]]), zero, zero, 0, 0.5)
        >>> move
        tensor([[-0.5000,  0.5000]])

    References:
        Adam: A Method for Stochastic Optimization, arXiv 1412.6980, algorithm 1.
    """
    first = BETA1 * first + (1 - BETA1) * gradient
    second = BETA2 * second + (1 - BETA2) * gradient**2
    scale = (second / (1 - BETA2 ** (step + 1))).sqrt() + EPSILON
    return -lr / (1 - BETA1 ** (step + 1)) * first / scale, first, second


def clamp_norm(vectors: Tensor, limit: Tensor) -> Tensor:
    """Vectors, shortened to a length where they are longer.

    Args:
        vectors: [..., D].
        limit: Largest length, [..., 1].

    Examples:
        >>> clamp_norm(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.ones(2, 1))
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return torch.where(norm > limit, vectors * limit / norm, vectors)
