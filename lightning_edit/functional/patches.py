# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The losses of T-Patcher: neurons that fire for one mistake and stay silent for all else."""

# Shapes: P patches, M remembered states.

from __future__ import annotations

from torch import Tensor

__all__ = ["activation_loss", "margin_losses"]

# Beyond it, float32 knows no exponential.
_MAX_EXPONENT = 80.0


def activation_loss(own: Tensor, threshold: float = 0.0, top: int = 5) -> Tensor:
    """Lₐ, the mean of the largest exp(μ − q): patches are to fire where they are wanted.

    Args:
        own: Pre-activation q of each patch at its own position, [P].
        threshold: μ.
        top: How many of the largest count.

    Returns:
        A scalar.

    References:
        Transformer-Patcher, arXiv 2301.09785, section 3.4.

    Examples:
        >>> import torch
        >>> activation_loss(torch.tensor([0.0, 2.0]), top=1)
        tensor(1.)
    """
    return _largest(_exp(threshold - own), top)


def margin_losses(
    memory: Tensor, own: Tensor, gap: float = 3.0, ceiling: float = -3.0, top: int = 1000
) -> tuple[Tensor, Tensor]:
    """The two memory losses: patches are to be silent for what is remembered.

    Means of the largest exp(q' − q + γ₁), by which a remembered state lies under the patch's own
    position, and of the largest exp(q' − γ₂), by which it lies under the threshold of the ReLU.

    Args:
        memory: Pre-activation q' of each patch at each remembered state, [M, P].
        own: Pre-activation q of each patch at its own position, [P].
        gap: γ₁.
        ceiling: γ₂.
        top: How many of the largest count.

    Returns:
        Two scalars.

    References:
        Transformer-Patcher, arXiv 2301.09785, section 3.4.

    Examples:
        >>> import torch
        >>> margin_losses(torch.tensor([[-3.0], [0.0]]), torch.tensor([3.0]), top=1)
        (tensor(1.), tensor(20.0855))
    """
    first = _largest(_exp(memory - own + gap), top)
    return first, _largest(_exp(memory - ceiling), top)


def _exp(exponents: Tensor) -> Tensor:
    return exponents.clamp_max(_MAX_EXPONENT).exp()


def _largest(values: Tensor, top: int) -> Tensor:
    flat = values.flatten()
    return flat.topk(min(top, flat.numel())).values.mean()
