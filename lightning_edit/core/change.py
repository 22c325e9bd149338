# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The change of one parameter: low-rank factors, or a dense tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Change", "LowRank", "add_changes", "dense_change", "tensors_of"]


@dataclass(frozen=True)
class LowRank:
    """A change ``u vᵀ`` of one parameter, in the parameter's own storage layout.

    Args:
        u: Shape [rows, rank], float32.
        v: Shape [columns, rank], float32.
    """

    u: Tensor
    v: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter that this changes."""
        return torch.Size((self.u.shape[0], self.v.shape[0]))

    @property
    def rank(self) -> int:
        """Number of rank-one terms kept."""
        return self.u.shape[1]

    def dense(self) -> Tensor:
        """The change as one matrix, [rows, columns] float32, under mixed precision, too."""
        with torch.autocast(self.u.device.type, enabled=False):
            return self.u @ self.v.T


Change = LowRank | Tensor


def dense_change(change: Change) -> Tensor:
    """A change as a dense float32 tensor of the parameter's shape."""
    return change.dense() if isinstance(change, LowRank) else change


def tensors_of(change: Change) -> tuple[Tensor, ...]:
    """The tensors that make up a change."""
    return (change.u, change.v) if isinstance(change, LowRank) else (change,)


def add_changes(a: Change, b: Change) -> Change:
    """The sum of two changes of one parameter, on the device of the first.

    Concatenated factors stay exact; past half the smaller side a dense matrix is smaller.

    Examples:
        >>> one = LowRank(torch.ones(4, 1), torch.ones(6, 1))
        >>> add_changes(one, one).rank
        2
        >>> add_changes(one, add_changes(one, one)).shape
        torch.Size([4, 6])
    """
    # What was read from a file lies on the CPU, what was computed, on the model's device.
    device = tensors_of(a)[0].device
    if isinstance(a, LowRank) and isinstance(b, LowRank) and 2 * (a.rank + b.rank) <= min(a.shape):
        u, v = b.u.to(device), b.v.to(device)
        return LowRank(torch.cat([a.u, u], 1), torch.cat([a.v, v], 1))
    return dense_change(a) + dense_change(b).to(device)
