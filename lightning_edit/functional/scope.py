# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The scope of edits: how alike a prompt and an edit are, and how that is taught."""

# Shapes: B prompts, N edits, D width of an embedding.

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Distance", "chosen_edits", "scope_distances", "scope_loss"]

Distance = Literal["euclidean", "cosine"]

# Keeps log(1 − exp(−d)) finite where a prompt is the very edit.
_LEAST = 1e-6


def scope_distances(
    queries: Tensor, edits: Tensor, distance: Distance = "euclidean", scale: float = 1.0
) -> Tensor:
    """How far prompts are from edits: −log of their similarity.

    Args:
        queries: Embeddings of prompts, [B, D].
        edits: Embeddings of edits, [N, D].
        distance: ‖g(z) − g(q)‖² (``euclidean``) or 1 − cos (``cosine``).
        scale: What the distance is multiplied by.

    Returns:
        [B, N] float32, at least 0; the similarity is exp(−distance).

    References:
        Memory-Based Model Editing at Scale, arXiv 2206.06520, section 3.

    Examples:
        >>> queries, edits = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> scope_distances(queries, edits).round(decimals=4).tolist()
        [[0.0, 2.0]]
        >>> scope_distances(queries, edits, "cosine").round(decimals=4).tolist()
        [[0.0, 1.0]]
    """
    queries, edits = queries.float(), edits.float()
    if distance == "cosine":
        unit = torch.nn.functional.normalize
        # Rounding makes it slightly negative at times.
        return scale * (1 - unit(queries, dim=1) @ unit(edits, dim=1).T).clamp_min(0)
    # By differences, for products of matrices are off where vectors are long and near each other.
    mode = "donot_use_mm_for_euclid_dist"
    return scale * torch.cdist(queries, edits, compute_mode=mode).square()


def scope_loss(inside: Tensor, outside: Tensor) -> Tensor:
    """Balanced binary cross-entropy of similarities: both sides count alike, however many.

    Args:
        inside: Distances of pairs of a prompt and an edit that it is in the scope of, [P].
        outside: Those of pairs of a prompt and an edit that has nothing to do with it, [M].

    Returns:
        mean(−log s) over the one and mean(−log(1 − s)) over the other, with s = exp(−distance);
        a scalar.

    References:
        Memory-Based Model Editing at Scale, arXiv 2206.06520, section 3; balanced as in the
        authors' code.

    Examples:
        >>> scope_loss(torch.tensor([0.5]), torch.tensor([2.0])).item()
        0.645...
    """
    return inside.mean() - torch.log(-torch.expm1(-outside.clamp_min(_LEAST))).mean()


def chosen_edits(similarities: Tensor, threshold: float, ages: Tensor, overrides: Tensor) -> Tensor:
    """The edit that each prompt is in the scope of.

    It is the most similar one, if its similarity is above the threshold; of equally similar ones
    the newest. Where a newer edit that contradicts it has the prompt in its scope, too, the newer
    one holds.

    Args:
        similarities: [B, N], with at least one edit.
        threshold: What a similarity must exceed.
        ages: Larger for newer edits, [N] int64.
        overrides: True where the edit of a column contradicts that of the row and is newer,
            [N, N] bool.

    Returns:
        Indices [B] int64, −1 where a prompt is in no scope.

    Examples:
        >>> ages, none = torch.tensor([0, 1]), torch.zeros(2, 2, dtype=torch.bool)
        >>> chosen_edits(torch.tensor([[0.9, 0.8], [0.5, 0.5], [0.7, 0.7]]), 0.5, ages, none)
        tensor([ 0, -1,  1])
        >>> newer = torch.tensor([[False, True], [False, False]])
        >>> chosen_edits(torch.tensor([[0.9, 0.8], [0.9, 0.2]]), 0.5, ages, newer)
        tensor([1, 0])
    """
    inside = similarities > threshold
    largest = similarities.max(1).values

    def newest(among: Tensor) -> Tensor:
        return torch.where(among, ages, ages.min() - 1).argmax(1)

    found = newest(similarities == largest[:, None])
    found = torch.where(largest > threshold, found, -1)
    for _ in range(len(ages)):
        newer = overrides[found.clamp_min(0)] & inside & (found >= 0)[:, None]
        if not bool(newer.any()):
            break
        found = torch.where(newer.any(1), newest(newer), found)
    return found
