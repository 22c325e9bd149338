# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Which edits are in a model, by its fingerprint and the rows of a ledger."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lightning_edit.core.request import EditRequest
from lightning_edit.ledger.entries import Entry

__all__ = ["History", "Lineage", "Standing"]


@dataclass(frozen=True)
class Standing:
    """An edit that is in a model.

    Args:
        entry: Its row.
        requests: Those of its requests that were not taken out.
    """

    entry: Entry
    requests: tuple[EditRequest, ...]


@dataclass(frozen=True)
class Lineage:
    """How a model came to be what it is.

    Args:
        path: The rows that led to it, in order, from the first that the ledger knows.
        standing: The edits in it, in order.
    """

    path: tuple[Entry, ...] = ()
    standing: tuple[Standing, ...] = ()


@dataclass(frozen=True)
class _Node:
    """A state of a model: the row that led to it, and the state before."""

    entry: Entry
    earlier: _Node | None


class History:
    """States of models by their fingerprints, each with the rows that led to it.

    One ledger may know several models, and several that were made of one.

    Args:
        entries: Rows of a ledger, in order.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._states: dict[str, _Node | None] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Takes note of the next row."""
        if entry.kind == "proposed" or (entry.kind != "edit" and entry.before == entry.after):
            return  # nothing came of it, or not yet
        earlier = self._states.get(entry.before)
        if entry.kind != "edit" and not entry.delta:
            # The model is what it was before: so is all that is known of it.
            self._states[entry.after] = _back(earlier, entry.after)
        else:
            self._states[entry.after] = _Node(entry, earlier)

    def at(self, fingerprint: str) -> Lineage:
        """How a model came to be what it is; nothing where the ledger knows nothing of it."""
        path: list[Entry] = []
        node = self._states.get(fingerprint)
        while node is not None:
            path.append(node.entry)
            node = node.earlier
        path.reverse()
        standing: dict[int, Standing] = {}
        for entry in path:
            if entry.kind == "edit":
                standing[entry.id] = Standing(entry, entry.requests)
                continue
            gone = set(entry.request_ids)
            for one in [standing[number] for number in entry.undoes if number in standing]:
                left = tuple(request for request in one.requests if request.id not in gone)
                del standing[one.entry.id]
                if left and gone:
                    standing[one.entry.id] = replace(one, requests=left)
        ordered = sorted(standing.values(), key=lambda one: one.entry.id)
        return Lineage(tuple(path), tuple(ordered))


def _back(node: _Node | None, fingerprint: str) -> _Node | None:
    """The earlier state of a fingerprint; None where the model was one that no row led to."""
    while node is not None and node.entry.after != fingerprint:
        node = node.earlier
    return node
