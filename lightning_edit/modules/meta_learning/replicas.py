# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Processes that train one editor together: what they have to know of each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_edit.functional.ultra_edit import Normalizer
from lightning_edit.modules.meta_learning.factors import FactorRows

__all__ = ["Replicas"]


@dataclass(frozen=True)
class Replicas:
    """This process among those that share a batch. All of them must call each method.

    Args:
        rank: Number of this process.
        count: Number of processes.

    Examples:
        >>> Replicas().agree(True)
        True
    """

    rank: int = 0
    count: int = 1

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

    def moments(self, own: Normalizer) -> Iterator[Normalizer]:
        """The statistics that each process has of its own rows, in the order of the ranks."""
        if self.count == 1:
            yield own
            return
        packed = torch.cat([own.total[None], own.mean, own.squares])
        parts = [torch.empty_like(packed) for _ in range(self.count)]
        torch.distributed.all_gather(parts, packed)
        for part in parts:
            mean, squares = part[1:].chunk(2)
            yield Normalizer(part[0], mean, squares)

    def gathered(self, rows: FactorRows) -> FactorRows:
        """The rows of all processes, in the order of their requests."""
        if self.count == 1:
            return rows
        parts = [self._all(tensor) for tensor in (rows.inputs, rows.gradients, rows.requests)]
        order = torch.argsort(parts[2], stable=True)
        return FactorRows(*(part[order] for part in parts))

    def _all(self, tensor: Tensor) -> Tensor:
        sizes = [torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(self.count)]
        torch.distributed.all_gather(sizes, torch.tensor([len(tensor)], device=tensor.device))
        most = max(int(size) for size in sizes)
        filled = tensor.new_zeros(most, *tensor.shape[1:])
        filled[: len(tensor)] = tensor
        parts = [torch.empty_like(filled) for _ in range(self.count)]
        torch.distributed.all_gather(parts, filled)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
