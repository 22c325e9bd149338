# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The closed form of MEMIT and its kin: many pairs into one linear memory, by ridge regression."""

# Shapes: n pairs to write, N keys with those of earlier edits, M inputs and D outputs of the edited
# matrix W [D, M], P protected directions. Where W is several matrices side by side, such as those
# of B experts, C has B blocks of m inputs on its diagonal, M = B m, and is given as [B, m, m].

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = [
    "factorize",
    "key_strengths",
    "outside",
    "preserving_update",
    "projected_update",
    "protected_directions",
    "ridge_for_share",
    "whitened",
]

# Size of a negative eigenvalue, relative to the largest one, that rounding accounts for.
MAX_NEGATIVE = 1e-3


def factorize(second_moment: Tensor) -> Tensor:
    """The Cholesky factor of C, made once for all edits of a layer.

    Args:
        second_moment: C = E[k kᵀ], [M, M], positive definite; or its blocks, [B, m, m].

    Returns:
        Lower triangular factor, float64, or those of the blocks.

    Raises:
        ValueError: If C is not positive definite in float64.

    Examples:
        >>> factorize(torch.eye(2) * 4).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    # By columns, as LAPACK has it, so that the factor takes the place of the copy.
    by_columns = second_moment.mT.to(
        torch.float64, copy=True, memory_format=torch.contiguous_format
    ).mT
    found = _factor(by_columns)
    if found is None:
        raise ValueError(
            "`second_moment` is expected to be positive definite, but it is singular: it was made "
            f"from too few tokens for its {second_moment.shape[-1]} dimensions. Use more tokens, "
            "or add a ridge."
        )
    return found


def whitened(keys: Tensor, factor: Tensor) -> Tensor:
    """C⁻¹ K.

    Args:
        keys: K, [M, N].
        factor: Cholesky factor of C, [M, M] float64, or of its blocks, [B, m, m].

    Returns:
        [M, N] float64.

    Examples:
        >>> blocks = torch.stack([torch.eye(1), 2 * torch.eye(1)]).double()
        >>> whitened(torch.tensor([[1.0], [8.0]]), blocks).tolist()
        [[1.0], [2.0]]
    """
    # `cholesky_solve` would copy the factor, which is as large as C.
    half = _half_whitened(keys, factor)
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solved.reshape(keys.shape)


def key_strengths(keys: Tensor, factor: Tensor) -> Tensor:
    """Strengths q = kᵀ C⁻¹ k of keys: alone, a key's pair is written to the share q / (q + λ).

    Args:
        keys: K, [M, N].
        factor: Cholesky factor of C, [M, M] float64, or of its blocks, [B, m, m].

    Returns:
        q, [N] float64.

    Examples:
        >>> key_strengths(torch.eye(2) * 3, torch.eye(2).double()).tolist()
        [9.0, 9.0]
    """
    return _half_whitened(keys, factor).square().flatten(0, -2).sum(0)


def _half_whitened(keys: Tensor, factor: Tensor) -> Tensor:
    """L⁻¹ K, where C = L Lᵀ: [M, N], or [B, m, N] of blocks."""
    columns = keys.double().reshape(*factor.shape[:-1], -1)
    half: Tensor = torch.linalg.solve_triangular(factor, columns, upper=False)
    return half


def ridge_for_share(strengths: Tensor, share: float) -> float:
    """λ at which the median key's pair, alone, is written to a share: q (1 − s) / s.

    Args:
        strengths: q of keys, [N]; see ``key_strengths``.
        share: s, between 0 and 1.

    Returns:
        λ.

    Examples:
        >>> ridge_for_share(torch.tensor([1.0, 9.0, 20.0]), 0.75)
        3.0
    """
    return float(strengths.median()) * (1 - share) / share


def preserving_update(
    keys: Tensor,
    residuals: Tensor,
    factor: Tensor,
    ridge: float,
    old_gram: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The factors of ΔW = R Kᵀ (λ C + A Aᵀ)⁻¹, which stores pairs and spares what C stands for.

    A are the keys of this edit, K, and of all before it, whose pairs keep what they have. With few
    keys their own system is solved: for A = K, ΔW = R (λ I + Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹; with more keys
    than inputs, that of the inputs.

    Args:
        keys: A, earlier keys first, [M, N].
        residuals: R, what the memory lacks at the last n of the keys, [D, n].
        factor: Cholesky factor of C, [M, M] float64, or of its blocks; see ``factorize``.
        ridge: λ, how many keys C counts for; 0 stores the pairs exactly where that can be done.
        old_gram: Σ k kᵀ of keys that are not among A, [M, M] float64.

    Returns:
        Left factor [D, n] and right factor [M, n], float32.

    Raises:
        ValueError: If λ is 0 and the keys depend on each other.

    Examples:
        >>> u, v = preserving_update(torch.eye(2), torch.eye(2), torch.eye(2).double(), 1.0)
        >>> (u @ v.T).tolist()
        [[0.5, 0.0], [0.0, 0.5]]

    References:
        Mass-Editing Memory in a Transformer, arXiv 2210.07229, equation 14.
    """
    keys64 = keys.double()
    inputs, pairs = keys.shape
    if pairs <= inputs and old_gram is None:
        columns = whitened(keys64, factor)
        right = _spread(columns, keys64.T @ columns, ridge)
    else:
        moment = factor @ factor.mT
        moment = moment if moment.ndim == 2 else _block_diagonal(moment)
        system = ridge * moment + keys64 @ keys64.T
        system = system if old_gram is None else system + old_gram.double()
        right = torch.cholesky_solve(keys64, _cholesky(system, ridge))
    return residuals.float(), right[:, pairs - residuals.shape[1] :].float()


def protected_directions(
    second_moment: Tensor, threshold: float | None = None, share: float = 0.7
) -> tuple[Tensor, float]:
    """Directions in which keys of other facts lie: leading eigenvectors of C.

    Args:
        second_moment: C = E[k kᵀ], [M, M], or its blocks, [B, m, m].
        threshold: Eigenvalues from which directions are protected. It depends on the model's
            scale; the authors use 0.02.
        share: Without a threshold, the share of C's trace that the protected directions hold.

    Returns:
        Orthonormal columns Q, [M, P] float32, and the relative gap between the last protected and
        the first free eigenvalue: where it is tiny, rounding decides on which side they fall. Of
        blocks those of each, [B, m, P], with columns of zeros where it has fewer than others, and
        the smallest gap.

    Raises:
        ValueError: If C has negative eigenvalues, or nothing is left free.

    Examples:
        >>> q, gap = protected_directions(torch.diag(torch.tensor([3.0, 1.0])), threshold=2.0)
        >>> q.abs().tolist(), round(gap, 2)
        ([[1.0], [0.0]], 0.67)

    References:
        AlphaEdit, arXiv 2410.02355, section 3.2.
    """
    if second_moment.ndim > 2:
        parts = [protected_directions(block, threshold, share) for block in second_moment]
        columns = pad_sequence([q.T for q, _ in parts], batch_first=True)
        return columns.mT.contiguous(), min(gap for _, gap in parts)
    values, vectors = torch.linalg.eigh(second_moment.double())
    if float(values[0]) < -MAX_NEGATIVE * float(values[-1]):
        raise ValueError(
            "`second_moment` is expected to have no negative eigenvalues, but it has "
            f"{float(values[0]):.3g}. Give E[k kᵀ] of keys of the model."
        )
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    if threshold is not None:
        count = int((values >= threshold).sum())
    else:
        held = values.cumsum(0) / values.sum()
        count = int((held < share).sum()) + 1
    if count >= len(values):
        raise ValueError(
            f"All {len(values)} directions of the keys would be protected, so that nothing can be "
            "written. Raise `nullspace_threshold`, or lower `protected_share`."
        )
    gap = float((values[count - 1] - values[count]) / values[count - 1]) if count else 1.0
    return vectors[:, :count].float(), gap


def outside(columns: Tensor, directions: Tensor) -> Tensor:
    """What is left of columns outside of protected directions: P X = X − Q Qᵀ X.

    Args:
        columns: X, [M, N].
        directions: Q, orthonormal columns, [M, P], or those of blocks, [B, m, P].

    Returns:
        [M, N].

    Examples:
        >>> outside(torch.ones(2, 1), torch.tensor([[1.0], [0.0]])).tolist()
        [[0.0], [1.0]]
    """
    blocks = columns.reshape(*directions.shape[:-1], -1)
    return (blocks - directions @ (directions.mT @ blocks)).reshape(columns.shape)


def projected_update(
    keys: Tensor,
    residuals: Tensor,
    protected: Tensor,
    ridge: float,
    old_gram: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The factors of ΔW = R Kᵀ P (P A Aᵀ P + λ I)⁻¹, which leaves protected directions alone.

    P projects on what is orthogonal to the protected directions, and A are the keys of this edit,
    K, and of all before it. The system of the keys or of the inputs is solved, whichever is
    smaller.

    Args:
        keys: A, earlier keys first, [M, N].
        residuals: R of the last n of the keys, [D, n]; the others keep what they have.
        protected: Q, orthonormal columns, [M, P], or those of blocks, [B, m, P].
        ridge: λ.
        old_gram: Σ k kᵀ of keys that are not among A, [M, M] float64.

    Returns:
        Left factor [D, n] and right factor [M, n], float32.

    Raises:
        ValueError: If λ is 0 and the projected keys depend on each other.

    Examples:
        >>> q = torch.tensor([[1.0], [0.0]])
        >>> u, v = projected_update(torch.ones(2, 1), torch.ones(1, 1), q, 1.0)
        >>> (u @ v.T).tolist()
        [[0.0, 0.5]]

    References:
        AlphaEdit, arXiv 2410.02355, equation 14.
    """
    directions = protected.double()
    projected = outside(keys.double(), directions)
    inputs, pairs = keys.shape
    if pairs <= inputs and old_gram is None:
        right = _spread(projected, projected.T @ projected, ridge)
    else:
        system = projected @ projected.T
        if old_gram is not None:
            system = system + outside(outside(old_gram.double(), directions).T, directions)
        system.diagonal().add_(ridge)
        right = torch.cholesky_solve(projected, _cholesky(system, ridge))
    return residuals.float(), right[:, pairs - residuals.shape[1] :].float()


def _spread(columns: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """Columns (gram + λ I)⁻¹, [M, N]."""
    system = gram.clone()
    system.diagonal().add_(ridge)
    return torch.cholesky_solve(columns.T, _cholesky(system, ridge)).T


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Blocks, [B, m, m], on the diagonal of one matrix, [B m, B m]."""
    count, width, _ = blocks.shape
    places = torch.arange(count, device=blocks.device)
    whole = blocks.new_zeros(count, width, count, width)
    whole[places, :, places] = blocks
    return whole.reshape(count * width, count * width)


def _cholesky(system: Tensor, ridge: float) -> Tensor:
    found = _factor(system)
    if found is None:
        raise ValueError(
            f"The keys of the edits depend on each other, which a ridge of {ridge:g} cannot make "
            "up for: two requests may be about the same subject. Raise it, or edit them one after "
            "another."
        )
    return found


def _factor(system: Tensor) -> Tensor | None:
    """Cholesky factor of a system, [..., M, M] float64, written over it; None if singular."""
    largest = system.diagonal(dim1=-2, dim2=-1).amax(-1)
    failed = torch.empty(system.shape[:-2], dtype=torch.int32, device=system.device)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(system, out=(system, failed))
    # By rounding, a singular system may pass with a pivot that means nothing.
    smallest = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    is_singular = bool(failed.any()) or not bool((smallest >= 1e-13 * largest).all())
    return None if is_singular else factor
