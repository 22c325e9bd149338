# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The mathematics of MALMEN: a residual network, and value differences joined by least squares."""

# Shapes: N rows, F features (inputs I and outputs O of a projection together), R rank.

from __future__ import annotations

from torch import Tensor

__all__ = ["malmen_block", "value_differences"]


def malmen_block(
    rows_NF: Tensor,
    down_FR: Tensor,
    up_RF: Tensor,
    bias_F: Tensor,
    scale_F: Tensor,
    shift_F: Tensor,
) -> Tensor:
    """The layer h + s relu(h A B + b) + o: the identity while B, b and o are zero.

    The gradient of the ReLU at 0 is 1, without which the identity would never be left.

    Args:
        rows_NF: h, [N, F].
        down_FR: A, [F, R].
        up_RF: B, [R, F].
        bias_F: b, [F].
        scale_F: s, which belongs to the edited matrix rather than to its shape, [F].
        shift_F: o, likewise, [F].

    Returns:
        [N, F].

    Examples:
        >>> import torch
        >>> eye, zero, one = torch.eye(2), torch.zeros(2), torch.ones(2)
        >>> malmen_block(torch.tensor([[1.0, -1.0]]), eye, eye, zero, -one, zero).tolist()
        [[0.0, -1.0]]

    References:
        Massive Editing for Large Language Models via Meta Learning, arXiv 2311.04661, section 4.1.
    """
    inner = (rows_NF @ down_FR) @ up_RF + bias_F
    return rows_NF + scale_F * inner.clamp(min=0) + shift_F


def value_differences(
    keys_NI: Tensor, pseudo_keys_NI: Tensor, pseudo_gradients_NO: Tensor, edit_lr: Tensor
) -> Tensor:
    """D = −η (k · k̃) g̃ of each row: what the edit is to add to the output at the key.

    Args:
        keys_NI: k, [N, I].
        pseudo_keys_NI: k̃, [N, I].
        pseudo_gradients_NO: g̃, [N, O].
        edit_lr: η, the learned step size of the edited matrix, a scalar.

    Returns:
        [N, O].

    Examples:
        >>> import torch
        >>> one = torch.ones(1, 2)
        >>> value_differences(one, one, torch.ones(1, 1), torch.tensor(0.5)).tolist()
        [[-1.0]]

    References:
        Massive Editing for Large Language Models via Meta Learning, arXiv 2311.04661, section 4.1.
    """
    return -edit_lr * (keys_NI * pseudo_keys_NI).sum(1, keepdim=True) * pseudo_gradients_NO
