# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""WISE: how far a side matrix moves a layer's activations, its margins, and merging by TIES."""

# Shapes: B rows, T positions, O outputs of the layer, S vectors that are merged.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["activation_distance", "routing_loss", "ties"]


def activation_distance(
    outputs: Tensor,
    changed: Tensor,
    mask: Tensor,
    activation: Callable[[Tensor], Tensor],
    long_prompt: int | None = None,
) -> Tensor:
    """D, the mean over tokens of ‖a(x W'ᵀ) − a(x Wᵀ)‖₂.

    Args:
        outputs: x Wᵀ, [B, T, O].
        changed: x W'ᵀ, [B, T, O].
        mask: Tokens that count, [B, T] bool, at least one in each row.
        activation: a, the model's activation function.
        long_prompt: Tokens of a row from which on its D is the largest of theirs, which a mean
            over so many would hide; never if None.

    Returns:
        [B] float32.

    References:
        WISE, arXiv 2405.14768, section 2.3.1.

    Examples:
        >>> import torch
        >>> outputs, mask = torch.zeros(1, 2, 2), torch.tensor([[True, False]])
        >>> activation_distance(outputs, outputs + torch.tensor([3.0, 4.0]), mask, torch.relu)
        tensor([5.])
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> changed = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
        >>> activation_distance(outputs, changed, mask, torch.relu)
        tensor([3.])
        >>> activation_distance(outputs, changed, mask, torch.relu, long_prompt=2)
        tensor([5.])
    """
    moved = activation(changed.float()) - activation(outputs.float())
    # The norm has no gradient at zero, where W' begins.
    distances = moved.square().sum(-1).clamp_min(1e-24).sqrt()
    kept = mask.float()
    mean = (distances * kept).sum(1) / kept.sum(1)
    if long_prompt is None:
        return mean
    return torch.where(kept.sum(1) >= long_prompt, (distances * kept).max(1).values, mean)


def routing_loss(edited: Tensor, other: Tensor, ceiling: float, floor: float, gap: float) -> Tensor:
    """Lₐ: other texts stay below α, edits above β, and γ lies between them.

    Means of relu(D_loc − α) + relu(β − D_edit) + relu(D_loc − D_edit + γ).

    Args:
        edited: D of the rows of edits, [B].
        other: D of a text that has nothing to do with them, [].
        ceiling: α.
        floor: β.
        gap: γ.

    Returns:
        A scalar.

    References:
        WISE, arXiv 2405.14768, equation 6.

    Examples:
        >>> import torch
        >>> routing_loss(torch.tensor([12.0]), torch.tensor(6.0), 5.0, 20.0, 10.0)
        tensor(13.)
    """
    above = torch.relu(other - ceiling) + torch.relu(floor - edited)
    return (above + torch.relu(other - edited + gap)).mean()


def ties(vectors: Tensor, density: float = 0.53) -> Tensor:
    """Merges task vectors: trim, elect a sign, and average what agrees with it.

    Args:
        vectors: [S, ...].
        density: Share of each vector's entries that is kept, the largest by magnitude.

    Returns:
        [...]

    References:
        TIES-Merging, arXiv 2306.01708, section 4; in WISE, arXiv 2405.14768, section 2.3.2.

    Examples:
        >>> import torch
        >>> ties(torch.tensor([[3.0, 1.0, -4.0], [1.0, -2.0, -2.0]]), density=1.0).tolist()
        [2.0, -2.0, -3.0]
    """
    flat = vectors.flatten(1)
    kept = max(1, round(density * flat.shape[1]))
    least = flat.abs().kthvalue(flat.shape[1] - kept + 1, dim=1, keepdim=True).values
    trimmed = torch.where(flat.abs() >= least, flat, 0.0)
    agrees = trimmed.sign() == trimmed.sum(0).sign()
    agrees &= trimmed != 0
    merged = (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)
    return merged.reshape(vectors.shape[1:])
