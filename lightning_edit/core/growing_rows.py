# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Rows to which others are added without copying those that are there."""

# Shapes: N rows there, K new ones.

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GrowingRows"]

_FEW = 16  # rows, before there is room to grow: they may be large


class GrowingRows:
    """Adds rows to tensors, in memory that doubles when it is full.

    What was given away stays what it is: rows are written behind it alone.

    Examples:
        >>> growing, rows = GrowingRows(), torch.zeros(16, 2)
        >>> rows = growing.added("keys", rows, torch.ones(1, 2))
        >>> more = growing.added("keys", rows, torch.ones(1, 2))
        >>> more.shape, more.data_ptr() == rows.data_ptr(), rows.shape
        (torch.Size([18, 2]), True, torch.Size([17, 2]))
    """

    def __init__(self) -> None:
        # Where the rows of each name lie, and how many of them have been written.
        self._written: dict[str, tuple[int, int]] = {}

    def added(self, name: str, rows: Tensor, new: Tensor) -> Tensor:
        """Rows and new ones after them.

        Args:
            name: Whose rows these are.
            rows: What this method returned last, or any others, [N, …].
            new: [K, …], on the device where all are to be.

        Returns:
            [N + K, …], in the memory of ``rows`` if that has room.
        """
        count, total = len(rows), len(rows) + len(new)
        if count < _FEW:
            return torch.cat([rows.to(new.device), new]) if count else new
        place, written = self._written.get(name, (0, 0))
        room = rows.untyped_storage().nbytes() // rows[0].nbytes if rows[0].nbytes else 0
        is_fixed = rows.is_inference() and not torch.is_inference_mode_enabled()
        if rows.data_ptr() == place and total <= room and not is_fixed:
            whole = rows.as_strided((room, *rows.shape[1:]), rows.stride(), 0)
            if written == count:
                whole[count:total] = new
                self._written[name] = place, total
            # Of others that were written there, somebody may have views.
            if written == count or (written >= total and torch.equal(whole[count:total], new)):
                return whole[:total]
        whole = new.new_empty(2 * total, *new.shape[1:])
        whole[:count], whole[count:total] = rows, new
        self._written[name] = whole.data_ptr(), total
        return whole[:total]
