# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""An entry of a memory, and how entries are put together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "MemoryEntry",
    "MemoryRecord",
    "Row",
    "entries_by_request",
    "read_description",
    "rows_fit",
    "stacked_rows",
    "written_description",
]

#: What a memory keeps of a request or an entry, as JSON types: each kind of memory knows its own.
MemoryRecord: TypeAlias = Mapping[str, Any]


class Row(Mapping[str, Tensor]):
    """One row of several tensors, which is looked up when it is asked for.

    Args:
        rows: Field to all rows of it, [N, …].
        number: Which row.

    Examples:
        >>> dict(Row({"sizes": torch.tensor([3.0, 4.0])}, 1))
        {'sizes': tensor(4.)}
    """

    __slots__ = ("number", "rows")

    def __init__(self, rows: Mapping[str, Tensor], number: int) -> None:
        self.rows = rows
        self.number = number

    def __getitem__(self, field: str) -> Tensor:
        return self.rows[field][self.number]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class MemoryEntry:
    """One row of a memory.

    Args:
        tensors: Field of the memory to this entry's row of it.
        requests: Ids of the requests that the entry answers, each with what is kept of it, as JSON
            types: its prompt and answer, and what the method has to know.
        notes: What else the method keeps of the entry, as JSON types.
    """

    tensors: Mapping[str, Tensor]
    requests: Mapping[str, MemoryRecord]
    notes: MemoryRecord = field(default_factory=dict)

    def equals(self, other: MemoryEntry | None) -> bool:
        """Whether another entry is the same, bit for bit."""
        return (
            other is not None
            and dict(self.requests) == dict(other.requests)
            and dict(self.notes) == dict(other.notes)
            and self.tensors.keys() == other.tensors.keys()
            and all(torch.equal(t.cpu(), other.tensors[n].cpu()) for n, t in self.tensors.items())
        )


def stacked_rows(
    fields: Sequence[str], entries: Sequence[MemoryEntry], device: torch.device
) -> dict[str, Tensor]:
    """The rows of entries."""
    return {f: torch.stack([e.tensors[f].detach().to(device) for e in entries]) for f in fields}


def rows_fit(rows: Mapping[str, Tensor], entries: Sequence[MemoryEntry]) -> bool:
    """Whether entries have rows of the shapes that there are."""
    return all(e.tensors[name].shape == t.shape[1:] for name, t in rows.items() for e in entries)


def entries_by_request(
    entries: Mapping[str, MemoryEntry], known: Mapping[str, list[str]] | None = None
) -> dict[str, list[str]]:
    """Names of the entries of each request, after those that are known."""
    index = dict(known or {})
    for name, entry in entries.items():
        for request in entry.requests:
            index[request] = [*index.get(request, ()), name]
    return index


def written_description(about: Mapping[str, object]) -> Tensor:
    """Settings and texts as JSON in bytes, [N] uint8."""
    return torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)


def read_description(state: Tensor) -> dict[str, Any]:
    """What ``written_description`` was given."""
    found: dict[str, Any] = json.loads(state.cpu().numpy().tobytes())
    return found
