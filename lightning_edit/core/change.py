# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The change of one parameter: low-rank factors, or a dense tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_edit.core.growing_rows import GrowingRows

__all__ = ["Change", "LowRank", "add_changes", "dense_change", "tensors_of"]

# Terms that are multiplied out at once: so many cost about as much as adding two matrices.
_BLOCK = 64


@dataclass
class _Head:
    """What the first terms of a sum come to, with which later sums begin, too."""

    made: tuple[int, Tensor | None] = (0, None)  # in one, so that no interrupt comes between
    #: A number of terms, and the norm of these, which nobody has to multiply out for again.
    norm: tuple[int, Tensor | None] = (0, None)
    growing: GrowingRows = field(default_factory=GrowingRows)


@dataclass(frozen=True)
class LowRank:
    """A change ``u vᵀ`` of one parameter, in the parameter's own storage layout.

    Of a stack of matrices, such as those of experts, one factor has those of each, and the other is
    common to them, with 1 in place of their number.

    Args:
        u: Shape [rows, rank], float32; of a stack of E matrices [E, rows, rank] or [1, rows, rank].
        v: Shape [columns, rank], float32; of a stack [E, columns, rank] or [1, columns, rank].

    Examples:
        >>> LowRank(torch.ones(1, 2, 1), torch.ones(4, 3, 1)).shape
        torch.Size([4, 2, 3])
    """

    u: Tensor
    v: Tensor
    # Kept in sums alone, to which edit after edit is added; any other is multiplied out but seldom.
    _head: _Head | None = field(default=None, repr=False, compare=False, kw_only=True)

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter that this changes."""
        stack = max(self.u.shape[:-2], self.v.shape[:-2])  # that of the factor that is not common
        return torch.Size((*stack, self.u.shape[-2], self.v.shape[-2]))

    @property
    def rank(self) -> int:
        """Number of rank-one terms kept."""
        return self.u.shape[-1]

    def dense(self) -> Tensor:
        """The change as a float32 tensor of the parameter's shape, under mixed precision, too.

        Terms are added up in blocks, each a product of its own, from the first to the last: so a
        sum that goes on from an earlier one has the bits of one made at once.
        """
        terms, matrix = (0, None) if self._head is None else self._head.made
        with torch.autocast(self.u.device.type, enabled=False):
            while terms + _BLOCK < self.rank:
                terms, matrix = terms + _BLOCK, self._grown(matrix, terms)
            whole = self._grown(matrix, terms)
            if self._head is not None:
                self._head.made = terms, matrix
                self._head.norm = self.rank, torch.linalg.vector_norm(whole)
            return whole

    def norm(self) -> float:
        """Frobenius norm of the change, in float32; of a sum that was multiplied out, known."""
        terms, norm = (0, None) if self._head is None else self._head.norm
        if norm is None or terms != self.rank:
            norm = torch.linalg.vector_norm(self.dense())
        return float(norm)

    def _grown(self, matrix: Tensor | None, start: int) -> Tensor:
        """A tensor and the block of terms that begins there."""
        # One layout, whatever that of the factors, so that a sum has the same bits in any.
        u, v = (factor[..., start : start + _BLOCK].contiguous() for factor in (self.u, self.v))
        if matrix is None:
            return u @ v.mT
        return torch.addmm(matrix, u, v.T) if u.ndim == 2 else matrix + u @ v.mT


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
    if isinstance(a, LowRank) and isinstance(b, LowRank) and _stays_small(a, b):
        head = _Head() if a._head is None else replace(a._head)
        u, v = (_joined(head, n, getattr(a, n), getattr(b, n).to(device)) for n in ("u", "v"))
        return LowRank(u, v, _head=head)
    return dense_change(a) + dense_change(b).to(device)


def _joined(head: _Head, name: str, terms: Tensor, new: Tensor) -> Tensor:
    """Terms of a factor and new ones after them, without copying those of many edits again."""
    if terms.ndim > 2:
        return torch.cat([terms, new], -1)
    return head.growing.added(name, terms.T, new.T).T


def _stays_small(a: LowRank, b: LowRank) -> bool:
    """Whether the factors of a sum take no more than half of what the sum itself takes."""
    rows, columns = (math.prod(factor.shape[:-1]) for factor in (a.u, a.v))
    alike = a.u.shape[:-1] == b.u.shape[:-1] and a.v.shape[:-1] == b.v.shape[:-1]
    return alike and 2 * (a.rank + b.rank) <= min(rows, columns)
