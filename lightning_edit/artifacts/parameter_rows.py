# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Changes of weights, compared parameter by parameter."""

# Shapes: M rows and N columns of a parameter, S columns of a sketch.

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_edit.artifacts.outcomes import ParameterRow
from lightning_edit.core.change import LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError

__all__ = ["differing_parameters", "numerical_rank", "parameter_rows"]

# Singular values that together hold less of a change's norm than this do not count.
TOLERANCE = 1e-3
MAX_RANK = 64


def parameter_rows(
    one: WeightDelta, other: WeightDelta, names: tuple[str, str]
) -> Iterator[ParameterRow]:
    """What two edits do to each parameter that one of them changes.

    Args:
        one: The first edit.
        other: The second edit.
        names: How to call them.

    Raises:
        ArtifactError: If a parameter has another shape in the one than in the other.
    """
    for name in dict.fromkeys((*one.changes, *other.changes)):
        original = one.originals.get(name, other.originals.get(name))
        norm = None if original is None else float(torch.linalg.vector_norm(original.float()))
        first = _figures(one, name, norm)
        second = _figures(other, name, norm)
        cosine = None
        if name in one.changes and name in other.changes:
            if one.changes[name].shape != other.changes[name].shape:
                raise ArtifactError(
                    f"`{name}` has the shape {list(one.changes[name].shape)} in {names[0]} and "
                    f"{list(other.changes[name].shape)} in {names[1]}: they belong to different "
                    "models. Compare edits of one model."
                )
            cosine = _cosine(one.dense(name), other.dense(name))
        yield ParameterRow(
            name, first[0], second[0], first[1], second[1], first[2], second[2], cosine
        )


def differing_parameters(
    one: nn.Module, other: nn.Module, names: tuple[str, str]
) -> Iterator[ParameterRow]:
    """The change from one model to another, at the parameters that differ.

    Args:
        one: The model before.
        other: The model after.
        names: How to call them.

    Raises:
        ArtifactError: If the models differ in more than the values of their parameters.
    """
    before, after = dict(one.named_parameters()), dict(other.named_parameters())
    for name in (*before, *after):
        shapes = [list(side[name].shape) if name in side else None for side in (before, after)]
        if shapes[0] != shapes[1]:
            raise ArtifactError(
                f"{names[0]} and {names[1]} differ in more than values: `{name}` is "
                f"{shapes[0] or 'not there'} in the one and {shapes[1] or 'not there'} in the "
                "other. Compare models of one architecture."
            )
    for name, original in before.items():
        whole = original.detach().float()
        change = after[name].detach().float() - whole
        if not bool(change.any()):
            continue
        size = float(torch.linalg.vector_norm(whole))
        norm, relative, rank = _figures(WeightDelta({name: change}), name, size)
        yield ParameterRow(name, norm_second=norm, relative_second=relative, rank_second=rank)


def numerical_rank(matrix_MN: Tensor, limit: int = MAX_RANK) -> int | None:
    """Number of singular values that hold a matrix up to 0.1 % of its norm; None above a limit.

    A sketch of a few random columns tells, so that large matrices need no decomposition.

    Args:
        matrix_MN: Shape [M, N].
        limit: Largest rank to find out.

    Examples:
        >>> numerical_rank(torch.ones(500, 1) @ torch.ones(1, 400)), numerical_rank(torch.eye(400))
        (1, None)

    References:
        Finding structure with randomness, arXiv 0909.4061, algorithm 4.1.
    """
    whole = torch.linalg.vector_norm(matrix_MN)
    if whole == 0:
        return 0
    generator = torch.Generator(matrix_MN.device).manual_seed(0)
    width = min(limit + 8, *matrix_MN.shape)
    sketch_NS = torch.randn(matrix_MN.shape[1], width, generator=generator, device=matrix_MN.device)
    basis_MS, _ = torch.linalg.qr(matrix_MN @ sketch_NS)
    projected_SN = basis_MS.T @ matrix_MN
    outside = torch.linalg.vector_norm(matrix_MN - basis_MS @ projected_SN)
    values_S = torch.linalg.svdvals(projected_SN.double())
    tails_S = values_S.square().flip(0).cumsum(0).flip(0).sqrt()
    rank = int(((tails_S.square() + outside.double() ** 2).sqrt() > TOLERANCE * whole).sum())
    is_whole = width == min(matrix_MN.shape)
    return rank if rank <= limit and (is_whole or outside < TOLERANCE * whole) else None


def _figures(
    delta: WeightDelta, name: str, size: float | None
) -> tuple[float | None, float | None, int | None]:
    """Norm, relative norm and rank of the change of one parameter."""
    change = delta.changes.get(name)
    if change is None:
        return None, None, None
    dense = delta.dense(name)
    norm = float(torch.linalg.vector_norm(dense))
    if isinstance(change, LowRank):
        rank: int | None = change.rank
    else:
        rank = numerical_rank(dense) if dense.ndim == 2 else None
    return norm, norm / size if size else None, rank


def _cosine(one: Tensor, other: Tensor) -> float | None:
    norms = torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other)
    return float((one * other).sum() / norms) if norms > 0 else None
