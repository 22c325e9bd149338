# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The closed form of ROME: the smallest change of a linear memory that stores one pair."""

# Shapes: E keys, M inputs, D outputs of the edited matrix W [D, M].

from __future__ import annotations

import torch
from torch import Tensor

from lightning_edit.functional.least_squares import whitened

__all__ = ["rank_one_update", "whiten"]


def whiten(keys: Tensor, factor: Tensor) -> Tensor:
    """C⁻¹ k, scaled to length one: the direction in which a key can be told from the others.

    Args:
        keys: k, [M], or several of them, [E, M], which take hardly longer than one.
        factor: Cholesky factor of C = E[k kᵀ] over many keys, [M, M] float64, or of its blocks; see
            ``factorize``.

    Returns:
        Directions of C⁻¹ k, in the shape of the keys, float32.

    Examples:
        >>> whiten(torch.tensor([3.0, 0.0]), torch.eye(2).double()).tolist()
        [1.0, 0.0]
    """
    solved = whitened(keys.reshape(-1, keys.shape[-1]).mT, factor).mT.reshape(keys.shape)
    unit: Tensor = solved / torch.linalg.vector_norm(solved, dim=-1, keepdim=True)
    return unit.float()


def rank_one_update(
    residual: Tensor, direction: Tensor, key: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of ΔW = r uᵀ / (u · k), for which (W + ΔW) k = W k + r.

    Args:
        residual: r = v* − W k, [D].
        direction: u = C⁻¹ k, [M].
        key: k, [M].

    Returns:
        Left factor [D, 1], right factor [M, 1], and the divisor u · k as a scalar tensor.

    Raises:
        ValueError: If u is orthogonal to k.

    Examples:
        >>> r, k = torch.tensor([2.0]), torch.tensor([1.0, 1.0])
        >>> u, v, _ = rank_one_update(r, k, k)
        >>> (u @ v.T @ k).tolist()
        [2.0]

    References:
        arXiv 2202.05262, equation 2.
    """
    divisor = direction @ key
    if float(divisor.abs()) < 1e-12 * float(torch.linalg.vector_norm(key)):
        raise ValueError(
            "`direction` is orthogonal to `key`: no rank-one change can store the pair."
        )
    return (residual / divisor)[:, None], direction[:, None], divisor
