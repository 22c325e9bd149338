# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What mass editors carry from edit to edit: keys of earlier edits, and λ."""

# Shapes: E requests, n keys of earlier edits, M inputs of the edited projection.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lightning_edit.functional.costs import KEYS_BESIDE_SUM

__all__ = ["EarlierEdits"]


@dataclass(frozen=True)
class EarlierEdits:
    """What earlier edits left at a layer; see ``carried``.

    Args:
        keys: Their keys, [M, n] float32; None where none are kept.
        gram: Σ k kᵀ of keys that are no longer among them, [M, M] float64.
        ridge: λ, if the first edit chose it.

    Examples:
        >>> memory = EarlierEdits().with_keys(torch.ones(1, 4))
        >>> sorted(memory.pack(7)), memory.joined(torch.zeros(2, 4)).shape
        (['keys/7'], torch.Size([4, 3]))
        >>> sorted(memory.with_keys(torch.ones(3, 4)).pack(7))
        ['gram/7', 'keys/7']
    """

    keys: Tensor | None = None
    gram: Tensor | None = None
    ridge: float | None = None

    @classmethod
    def unpack(cls, carried: Mapping[str, Tensor], layer: int) -> Self:
        """What an edit carries for a layer; nothing before the first edit."""
        ridge = carried.get(f"weight/{layer}")
        return cls(
            carried.get(f"keys/{layer}"),
            carried.get(f"gram/{layer}"),
            None if ridge is None else float(ridge),
        )

    def pack(self, layer: int) -> dict[str, Tensor]:
        """The same as tensors by name, for an edit to carry."""
        ridge = None if self.ridge is None else torch.tensor(self.ridge, dtype=torch.float64)
        named = {"keys": self.keys, "gram": self.gram, "weight": ridge}
        return {f"{name}/{layer}": part for name, part in named.items() if part is not None}

    def joined(self, keys: Tensor) -> Tensor:
        """The keys of earlier edits and those of a batch, [E, M], as columns: [M, n + E]."""
        old = keys.new_zeros(keys.shape[1], 0) if self.keys is None else self.keys
        return torch.cat([old, keys.T], 1)

    def with_keys(self, keys: Tensor) -> EarlierEdits:
        """The keys of earlier edits with those of a batch, [E, M].

        While there are few, they are kept as they are, which makes for small systems; from half of
        their dimensions on, the sum of their outer products takes less. That one is only added to
        when there are some keys again, since a checkpoint has to hold it anew each time.
        """
        joined = self.joined(keys)
        if joined.shape[1] <= joined.shape[0] // (2 if self.gram is None else KEYS_BESIDE_SUM):
            return EarlierEdits(joined, self.gram)
        whole = joined.double() @ joined.double().T
        # Tensors of earlier edits stay in a sum of edits until they are replaced.
        return EarlierEdits(joined[:, :0], whole if self.gram is None else whole + self.gram)
