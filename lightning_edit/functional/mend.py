# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The mathematics of MEND: a low-rank residual network on normalized factors of a gradient."""

# Shapes: N rows, F features (inputs and outputs of a projection together), R rank.

from __future__ import annotations

from torch import Tensor

__all__ = ["mend_block", "mend_factors"]


def mend_block(
    rows_NF: Tensor,
    up_FR: Tensor,
    down_RF: Tensor,
    bias_F: Tensor,
    scale_F: Tensor,
    shift_F: Tensor,
) -> Tensor:
    """The layer h + relu(s (U V h + b) + o): the identity while U, b and o are zero.

    The gradient of the ReLU at 0 is 1, without which the identity would never be left.

    Args:
        rows_NF: h, [N, F].
        up_FR: U, [F, R].
        down_RF: V, [R, F].
        bias_F: b, [F].
        scale_F: s, which belongs to the edited matrix rather than to its shape, [F].
        shift_F: o, likewise, [F].

    Returns:
        [N, F]; no coordinate is smaller than it was.

    Examples:
        >>> import torch
        >>> eye, zero, one = torch.eye(2), torch.zeros(2), torch.ones(2)
        >>> mend_block(torch.tensor([[1.0, -1.0]]), eye, eye, zero, one, zero).tolist()
        [[2.0, -1.0]]

    References:
        Fast Model Editing at Scale, arXiv 2110.11309, section 3.1, equations 4a and 4b.
    """
    inner = (rows_NF @ down_RF.T) @ up_FR.T + bias_F
    return rows_NF + (scale_F * inner + shift_F).clamp(min=0)


def mend_factors(
    inputs_NI: Tensor, gradients_NO: Tensor, edit_lr: Tensor, *, descent: bool = True
) -> tuple[Tensor, Tensor]:
    """The factors of ΔW = ∓ α Σ d̃ ũᵀ.

    Args:
        inputs_NI: ũ, transformed inputs, [N, I].
        gradients_NO: d̃, transformed gradients, [N, O].
        edit_lr: α, the learned step size of the edited matrix, a scalar.
        descent: Subtract, as in the paper; the authors' code adds.

    Returns:
        u [N, O] and v [N, I], with ΔW = uᵀ v.

    Examples:
        >>> import torch
        >>> u, v = mend_factors(torch.ones(1, 2), torch.ones(1, 1), torch.tensor(0.5))
        >>> (u.T @ v).tolist()
        [[-0.5, -0.5]]

    References:
        Fast Model Editing at Scale, arXiv 2110.11309, section 3.1; the sign: issue 13 of its code.
    """
    return (-edit_lr if descent else edit_lr) * gradients_NO, inputs_NI
