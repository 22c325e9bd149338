# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""An entry of a memory, and how entries are put together."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "MemoryEntry",
    "MemoryRecord",
    "Row",
    "Rows",
    "entries_by_request",
    "read_description",
    "rows_fit",
    "stacked_rows",
    "written_description",
]

#: What a memory keeps of a request or an entry, as JSON types: each kind of memory knows its own.
MemoryRecord: TypeAlias = Mapping[str, Any]


class Rows:
    """All rows of some fields, which may get other ones after them.

    Args:
        tensors: Field to all rows of it, [N, …].
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors


class Row(Mapping[str, Tensor]):
    """One row of several tensors, which is looked up when it is asked for.

    Args:
        rows: All rows.
        number: Which row.

    Examples:
        >>> rows = Rows({"sizes": torch.tensor([3.0, 4.0])})
        >>> one, other = Row(rows, 0), Row(rows, 1)
        >>> other.keep()
        >>> rows.tensors = {"sizes": torch.tensor([3.0, 5.0, 6.0])}
        >>> float(one["sizes"]), float(other["sizes"])
        (3.0, 4.0)
    """

    __slots__ = ("_kept", "number", "rows")

    def __init__(self, rows: Rows, number: int) -> None:
        self.rows = rows
        self.number = number
        self._kept: Mapping[str, Tensor] | None = None

    def keep(self) -> None:
        """Keeps what the row is, before another one takes its place among the rows."""
        self._kept = self._kept or {field: self[field].clone() for field in self}

    def __getitem__(self, field: str) -> Tensor:
        return self.rows.tensors[field][self.number] if self._kept is None else self._kept[field]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows.tensors)

    def __len__(self) -> int:
        return len(self.rows.tensors)


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


def rows_fit(rows: Mapping[str, Tensor], entries: Collection[MemoryEntry]) -> bool:
    """Whether entries have rows of the shapes that there are."""
    return all(e.tensors[name].shape == t.shape[1:] for name, t in rows.items() for e in entries)


def entries_by_request(entries: Mapping[str, MemoryEntry]) -> dict[str, list[str]]:
    """Names of the entries of each request."""
    index: dict[str, list[str]] = {}
    for name, entry in entries.items():
        for request in entry.requests:
            index.setdefault(request, []).append(name)
    return index


def written_description(about: Mapping[str, object]) -> Tensor:
    """Settings and texts as JSON in bytes, [N] uint8."""
    return torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)


def read_description(state: Tensor) -> dict[str, Any]:
    """What ``written_description`` was given."""
    found: dict[str, Any] = json.loads(state.cpu().numpy().tobytes())
    return found
