# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The codebook of GRACE: keys with radii, within which a value takes a layer's place."""

# Shapes: B rows, N keys, I width of a key, O width of a value, T positions.

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Replacement", "deferral_radii", "nearest_keys", "replace_outputs"]

Replacement = Literal["last", "prompt", "all"]

# What keeps the halves of a split apart.
_GAP = 1e-5


def nearest_keys(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest key of each query, and how far it is.

    Args:
        queries: [B, I].
        keys: [N, I], at least one; of equally near ones the first counts.

    Returns:
        Euclidean distances [B] float32 and indices [B] int64.

    Examples:
        >>> nearest_keys(torch.tensor([[3.0, 4.0]]), torch.tensor([[9.0, 9.0], [0.0, 0.0]]))
        (tensor([5.]), tensor([1]))
    """
    # By differences: the quick way through a product of matrices is off by more than a radius
    # where keys are long and near each other.
    distances = torch.cdist(
        queries.float(), keys.float(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    nearest = distances.min(1)
    return nearest.values, nearest.indices


def deferral_radii(
    distance: Tensor, nearest_radius: Tensor, initial_radius: float, *, same_label: bool
) -> tuple[Tensor, Tensor | None]:
    """What an edit does to the radius of the nearest key, and the radius of a key of its own.

    Too far away (d > ε₀ + ε), the edit gets a key of radius ε₀. Near a key of the same label, it
    needs none: that key's radius grows to cover it. Near a key of another label, they part at
    half way: ε = d/2 − 10⁻⁵ for the old, d/2 for the new.

    Args:
        distance: d between the edit's query and the nearest key, [].
        nearest_radius: ε of that key, [].
        initial_radius: ε₀.
        same_label: Whether the edit has the label of that key.

    Returns:
        The nearest key's radius, [], and that of a new key, [], or None for no new key.

    References:
        Aging with GRACE, arXiv 2211.11031, section 3.1 and algorithm 1.

    Examples:
        >>> d, radius = torch.tensor(1.5), torch.tensor(1.0)
        >>> deferral_radii(d, radius, 1.0, same_label=True)
        (tensor(1.5000), None)
        >>> deferral_radii(d, radius, 1.0, same_label=False)
        (tensor(0.7500), tensor(0.7500))
        >>> deferral_radii(d, radius, 0.2, same_label=False)
        (tensor(1.), tensor(0.2000))
    """
    if distance > initial_radius + nearest_radius:
        return nearest_radius, torch.full_like(nearest_radius, initial_radius)
    if same_label:
        return torch.maximum(nearest_radius, distance), None
    return distance / 2 - _GAP, distance / 2


def replace_outputs(
    outputs: Tensor, values: Tensor, rows: Tensor, positions: Tensor, where: Replacement
) -> Tensor:
    """Puts values in the place of a layer's outputs; all other outputs keep their bits.

    Args:
        outputs: [B, T, O].
        values: What each row gets, [B, O].
        rows: Which rows get it, [B] bool.
        positions: Column at which each row is asked, [B] int64.
        where: At that position (``last``), at all ``prompt`` positions before it, or at ``all``.

    Returns:
        [B, T, O], with a gradient to the values.

    References:
        Aging with GRACE, arXiv 2211.11031, section 3.1; the three places as in the authors' code.
    """
    columns = torch.arange(outputs.shape[1], device=outputs.device)[None]
    at = positions[:, None]
    places = {"last": columns == at, "prompt": columns < at, "all": columns >= 0}[where]
    chosen = (rows[:, None] & places)[..., None]
    return torch.where(chosen, values[:, None].to(outputs.dtype), outputs)
