# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Processes that share a piece of work: which share is whose, and what they tell each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
import torch.distributed
from torch import Tensor

__all__ = ["Processes", "tells_of_loss"]

T = TypeVar("T")

# What process groups say of a process that is gone: gloo, and NCCL.
_LOST = re.compile(r"closed by peer|reset by peer|timed? ?out|broken pipe|aborted", re.IGNORECASE)


def tells_of_loss(error: BaseException) -> bool:
    """Whether an error is that of a process group, one of whose processes is gone or hangs.

    Examples:
        >>> tells_of_loss(RuntimeError("Connection closed by peer [127.0.0.1]:1"))
        True
    """
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


@dataclass(frozen=True)
class Processes:
    """This process among those that share a piece of work. All of them must call each method.

    Args:
        rank: Number of this process.
        count: Number of processes.

    Examples:
        >>> alone = Processes()
        >>> alone.agree(True), list(alone.share(3)), list(Processes(1, 2).share(5))
        (True, [0, 1, 2], [1, 3])
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def running(cls) -> Self:
        """The processes of ``torch.distributed``; this one alone where it is not in use."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def share(self, count: int) -> range:
        """Which of so many things are this process's part of the work."""
        return range(self.rank, count, self.count)

    def agree(self, answer: bool) -> bool:
        """Whether all processes say yes."""
        if self.count == 1:
            return answer
        votes = torch.tensor(float(answer))
        if torch.distributed.get_backend() == "nccl":
            votes = votes.cuda()
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
        return bool(votes)

    def total(self, part: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.count == 1:
            return part
        whole = part.clone()
        torch.distributed.all_reduce(whole)
        return whole

    def parts(self, own: Tensor) -> list[Tensor]:
        """A tensor of each process, in the order of the ranks; all have one shape."""
        if self.count == 1:
            return [own]
        parts = [torch.empty_like(own) for _ in range(self.count)]
        torch.distributed.all_gather(parts, own.contiguous())
        return parts

    def joined(self, rows: Tensor) -> Tensor:
        """The rows of all processes, one after another; each may have another number of them."""
        if self.count == 1:
            return rows
        lengths = self.parts(torch.tensor([len(rows)], device=rows.device))
        most = max(int(length) for length in lengths)
        filled = rows.new_zeros(most, *rows.shape[1:])
        filled[: len(rows)] = rows
        parts = self.parts(filled)
        return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])

    def merged(self, rows: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor:
        """The rows of all processes, each in the place that ``share`` gives it.

        Args:
            rows: This process's rows, [its share, ...]; None where its share is empty.
            shape: Shape of the whole, [rows of all, ...].
            like: A tensor of the device on which the whole shall be.

        Returns:
            [rows of all, ...] float32, the same bits on every process.
        """
        if self.count == 1 and rows is not None:
            return rows.to(like.device, torch.float32)
        whole = torch.zeros(*shape, device=like.device)
        if rows is not None:
            whole[list(self.share(shape[0]))] = rows.to(like.device, torch.float32)
        # All other entries are zero, so the sum is exact.
        return self.total(whole)

    def objects(self, own: T) -> list[T]:
        """An object of each process, in the order of the ranks."""
        if self.count == 1:
            return [own]
        found = [own] * self.count
        torch.distributed.all_gather_object(found, own)
        return found
