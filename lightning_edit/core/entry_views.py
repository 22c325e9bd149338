# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Entries of a memory as objects that are made once, however many others come after them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import reduce
from itertools import compress, count, islice
from operator import is_not
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from lightning_edit.core.growing_rows import GrowingRows
from lightning_edit.core.memory_entry import MemoryEntry, Row, Rows

__all__ = ["EntryViews", "Held", "ViewState"]

#: The buffers of a memory, and its entries without their tensors.
Held: TypeAlias = tuple[dict[str, Tensor], dict[str, MemoryEntry]]


class ViewState(NamedTuple):
    """What ``EntryViews`` were at some time."""

    entries: dict[str, MemoryEntry]
    held: Held
    rows: Rows
    tensors: Mapping[str, Tensor]


class EntryViews:
    """The entries that a memory holds, whose tensors are rows of its buffers.

    An entry is one and the same object for as long as nothing of it changes, so that what an edit
    changes is found without reading a tensor. One that is no longer held stays what it was.

    Examples:
        >>> held = {"sizes": torch.tensor([3.0, 4.0])}, {n: MemoryEntry({}, {n: {}}) for n in "ab"}
        >>> views = EntryViews()
        >>> entries = views.of(held)
        >>> float(entries["b"].tensors["sizes"])
        4.0
        >>> other = MemoryEntry({"sizes": torch.tensor(5.0)}, {"c": {}})
        >>> list(views.changed({**entries, "c": other})), views.changed({"b": entries["b"]})
        (['c'], None)
    """

    def __init__(self) -> None:
        self._entries: dict[str, MemoryEntry] = {}
        self._held: Held = {}, {}
        self._rows = Rows({})
        self._growing = GrowingRows()

    def of(self, held: Held) -> dict[str, MemoryEntry]:
        """The entries by name, in order; made anew where something else is held than was seen last.

        Args:
            held: What the memory holds.
        """
        if not _is_same(held, self._held):
            rows = Rows(held[0])
            self._entries = {
                name: MemoryEntry(Row(rows, i), record.requests, record.notes)
                for i, (name, record) in enumerate(held[1].items())
            }
            self._held, self._rows = held, rows
        return self._entries

    def changed(self, entries: Mapping[str, MemoryEntry]) -> dict[str, MemoryEntry] | None:
        """Those of some entries that take the place of others, or come after all.

        Args:
            entries: Entries by name, in order.

        Returns:
            These, by name; None where an entry is gone or stands elsewhere.
        """
        before = self._entries
        if list(islice(entries, len(before))) != list(before):
            return None
        others = list(compress(count(), map(is_not, entries.values(), before.values())))
        names = list(entries) if others else []
        changed = {names[i]: entries[names[i]] for i in others}
        return changed | dict(islice(entries.items(), len(before), None))

    def rows_with(
        self, fields: Iterable[str], changed: Mapping[str, MemoryEntry], *, grows: bool
    ) -> dict[str, Tensor]:
        """Rows of fields, [N, …] each, once some entries take the place of others or come last.

        What stays shares its memory with what was there, which is not written to.

        Args:
            fields: The fields.
            changed: The entries, as ``changed`` tells them; their tensors fit.
            grows: Leave room behind the rows, for others to come.
        """
        total, numbers = len(self._entries), self._numbers(changed)
        found = {}
        for field in fields:
            rows = self._held[0][field]
            given = {numbers[name]: entry.tensors[field] for name, entry in changed.items()}
            others = {i: row for i, row in given.items() if i < total and not _is_at(row, rows[i])}
            if others:  # which may have more digits than rows that were converted with the model
                kinds = (row.dtype for row in others.values())
                rows = rows.to(reduce(torch.promote_types, kinds, rows.dtype), copy=True)
                for i, row in others.items():
                    rows[i] = row.detach().to(rows.device)
            new = [row.detach().to(rows.device) for i, row in given.items() if i >= total]
            if new and grows:
                rows = self._growing.added(field, rows, torch.stack(new))
            elif new:
                rows = torch.cat([rows, torch.stack(new)])
            found[field] = rows
        return found

    def go_on(self, held: Held, changed: Mapping[str, MemoryEntry]) -> None:
        """Takes over what a memory holds once entries took the place of others or came last.

        Args:
            held: What it holds now.
            changed: These entries, as ``changed`` told them.
        """
        numbers = self._numbers(changed)
        for name in changed.keys() & self._entries.keys():
            _row(self._entries[name]).keep()
        self._rows.tensors = held[0]
        new = {
            name: MemoryEntry(Row(self._rows, numbers[name]), entry.requests, entry.notes)
            for name, entry in changed.items()
        }
        self._entries, self._held = {**self._entries, **new}, held

    def sorted(self, names: Collection[str]) -> list[str]:
        """Names of entries in the order of these; of those that are not there, at the end."""
        numbers = self._numbers(dict.fromkeys(names))
        return sorted(names, key=numbers.__getitem__)

    @property
    def state(self) -> ViewState:
        """What ``put_back`` takes to come back to this."""
        return ViewState(self._entries, self._held, self._rows, self._rows.tensors)

    def put_back(self, state: ViewState) -> None:
        """Comes back to an earlier state; entries that came since stay what they are."""
        for name, entry in self._entries.items():
            if state.entries.get(name) is not entry and _row(entry).rows is state.rows:
                _row(entry).keep()
        self._entries, self._held, self._rows = state.entries, state.held, state.rows
        self._rows.tensors = state.tensors

    def _numbers(self, names: Iterable[str]) -> dict[str, int]:
        """Where entries stand, those that are not there after all others."""
        known, last = self._entries, count(len(self._entries))
        return {n: _row(known[n]).number if n in known else next(last) for n in names}


def _row(entry: MemoryEntry) -> Row:
    return cast(Row, entry.tensors)


def _is_at(row: Tensor, place: Tensor) -> bool:
    """Whether a row is what lies there."""
    return row.data_ptr() == place.data_ptr() and row.dtype == place.dtype


def _is_same(one: Held, other: Held) -> bool:
    """Whether the very same tensors and records are held."""
    return (
        one[1] is other[1]
        and one[0].keys() == other[0].keys()
        and all(tensor is other[0][name] for name, tensor in one[0].items())
    )
