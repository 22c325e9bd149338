# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A running normalizer and a ridge regression in closed form: of UltraEdit, MEND and MALMEN."""

# Shapes: N rows, F features, I inputs and O outputs of the edited matrix W [O, I].

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Normalizer",
    "merge_normalizers",
    "normalize",
    "ridge_factors",
    "ridge_update",
    "row_moments",
    "update_normalizer",
]


class Normalizer(NamedTuple):
    """Running statistics of rows of features; those of several matrices may flow into one.

    Args:
        total: n, the number of rows seen, a scalar float64 tensor.
        mean: μ, their mean, [F] float64.
        squares: S, their sum of squared distances from the mean, [F] float64.
    """

    total: Tensor
    mean: Tensor
    squares: Tensor


def update_normalizer(
    normalizer: Normalizer | None, rows_NF: Tensor, *, biased_variance: bool = False
) -> Normalizer:
    """Adds rows: n' = n + b, μ' = μ + b D / n', S' = S + (b − 1) Var(x) + n b D² / n'.

    D is mean(x) − μ.

    Whatever the split of rows into calls, the result is the same, save with ``biased_variance``.

    Args:
        normalizer: The statistics so far; None before the first rows.
        rows_NF: Further rows x, b of them, [N, F], any floating dtype.
        biased_variance: Add b Var(x), as the authors' code does, where Var divides by b − 1. That
            overstates S by b / (b − 1) and so depends on the split.

    Returns:
        New statistics; the old ones are left alone.

    Raises:
        ValueError: If there are no rows, or a single one with ``biased_variance``.

    Examples:
        >>> found = update_normalizer(None, torch.tensor([[1.0], [3.0]]))
        >>> float(found.mean), float(found.squares)
        (2.0, 2.0)

    References:
        UltraEdit, arXiv 2505.14679, section 4 (lifelong normalization).
    """
    count = rows_NF.shape[0]
    if count < 1 + biased_variance:
        raise ValueError(
            f"`rows_NF` is expected to hold at least {1 + biased_variance} rows"
            f"{', of which `biased_variance` takes a variance' if biased_variance else ''}, but "
            f"got {count}."
        )
    moments = row_moments(rows_NF)
    return merge_normalizers(normalizer, moments, biased_variance=biased_variance)


def row_moments(rows_NF: Tensor) -> Normalizer:
    """The statistics of some rows by themselves; zeros where there is no row.

    Args:
        rows_NF: Rows x, [N, F], any floating dtype.

    Examples:
        >>> row_moments(torch.tensor([[1.0], [3.0]])).squares.tolist()
        [2.0]
    """
    rows = rows_NF.double()
    count = rows.new_tensor(float(len(rows)))
    mean = rows.sum(0) / max(len(rows), 1)
    return Normalizer(count, mean, (rows - mean).square().sum(0))


def merge_normalizers(
    normalizer: Normalizer | None, moments: Normalizer, *, biased_variance: bool = False
) -> Normalizer:
    """Adds the statistics of further rows, such as those that another process has seen.

    Args:
        normalizer: The statistics so far; None before the first rows.
        moments: Those of the further rows, by ``row_moments``.
        biased_variance: As in ``update_normalizer``.

    Returns:
        New statistics; the old ones are left alone.

    Examples:
        >>> one, other = (row_moments(torch.tensor([[x]])) for x in (1.0, 3.0))
        >>> float(merge_normalizers(one, other).squares)
        2.0

    References:
        Chan, Golub, LeVeque, Algorithms for computing the sample variance, 1983.
    """
    count, squares = moments.total, moments.squares
    if biased_variance:
        squares = squares * count / (count - 1)
    if normalizer is None:
        return Normalizer(count, moments.mean, squares)
    total = normalizer.total + count
    share = count / total.clamp_min(1)
    step = moments.mean - normalizer.mean
    return Normalizer(
        total,
        normalizer.mean + share * step,
        normalizer.squares + squares + normalizer.total * share * step.square(),
    )


def normalize(rows_NF: Tensor, normalizer: Normalizer, eps: float) -> Tensor:
    """(x − μ) / (σ + ε) with σ = √(S / (n − 1 + ε)).

    Args:
        rows_NF: Rows x, [N, F], any floating dtype.
        normalizer: Statistics.
        eps: ε.

    Returns:
        Normalized rows, [N, F] float32.

    Examples:
        >>> seen = update_normalizer(None, torch.tensor([[1.0], [3.0]]))
        >>> normalize(torch.tensor([[3.0]]), seen, eps=0.0).item()
        0.7071067690849304
    """
    deviation = (normalizer.squares / (normalizer.total - 1 + eps)).sqrt()
    return ((rows_NF.double() - normalizer.mean) / (deviation + eps)).float()


def ridge_factors(
    keys_NI: Tensor, values_NO: Tensor, ridge: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The factors of ΔWᵀ = Hᵀ (H Hᵀ + λ I)⁻¹ V, which equals (Hᵀ H + λ I)⁻¹ Hᵀ V.

    Solves a system as large as the number of keys, in float64. Gradients flow to all arguments.

    Args:
        keys_NI: H, [N, I].
        values_NO: V, what the change is to add to the keys' outputs, [N, O].
        ridge: λ, above 0; a scalar tensor where it is learned.

    Returns:
        u [O, N] and v [I, N] float32, with ΔW = u vᵀ.

    Raises:
        ValueError: If the ridge is not above 0.

    Examples:
        >>> u, v = ridge_factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0]]), ridge=1.0)
        >>> (u @ v.T).tolist()
        [[2.0, 0.0]]

    References:
        UltraEdit, arXiv 2505.14679, section 4 (the closed form), by the push-through identity;
        MALMEN, arXiv 2311.04661, section 4.2.
    """
    _check_ridge(ridge)
    keys = keys_NI.double()
    system = keys @ keys.T + ridge * torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
    factor = torch.linalg.cholesky(system)
    return torch.cholesky_solve(values_NO.double(), factor).T.float(), keys_NI.T.float()


def ridge_update(
    keys_NI: Tensor, values_NO: Tensor, ridge: float
) -> tuple[Tensor, Tensor] | Tensor:
    """ΔW of ``ridge_factors``, in the form that takes less room.

    Args:
        keys_NI: H, [N, I].
        values_NO: V, [N, O].
        ridge: λ, above 0.

    Returns:
        Factors u [O, N] and v [I, N] while 2 N is at most the smaller side of W, and from there on
        ΔW [O, I]; float32. The system solved is never larger than I × I.

    Raises:
        ValueError: If the ridge is not above 0.

    Examples:
        >>> ridge_update(torch.ones(3, 2), torch.ones(3, 4), ridge=1.0).shape
        torch.Size([4, 2])
    """
    (count, inputs), outputs = keys_NI.shape, values_NO.shape[1]
    if 2 * count <= min(inputs, outputs):
        return ridge_factors(keys_NI, values_NO, ridge)
    if count <= inputs:
        u, v = ridge_factors(keys_NI, values_NO, ridge)
        return u @ v.T
    _check_ridge(ridge)
    keys = keys_NI.double()
    system = keys.T @ keys
    system.diagonal().add_(ridge)
    solved = torch.cholesky_solve(keys.T @ values_NO.double(), torch.linalg.cholesky(system))
    return solved.T.float()


def _check_ridge(ridge: float | Tensor) -> None:
    if not ridge > 0:
        raise ValueError(f"`ridge` is expected to be above 0, but got {ridge}.")
