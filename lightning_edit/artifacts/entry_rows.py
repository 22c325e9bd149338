# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Changes of memories, compared entry by entry."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from lightning_edit.artifacts.outcomes import EntryChange, EntryRow
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.side_memory import EditMemory, MemoryEntry

__all__ = ["entry_rows", "memory_as_found", "memory_change"]


def entry_rows(one: MemoryWrite | None, other: MemoryWrite | None) -> Iterator[EntryRow]:
    """What two edits do to each entry of a memory that one of them adds, replaces or removes.

    Args:
        one: The first edit; None for one that leaves memories alone.
        other: The second edit.

    Examples:
        >>> entry = MemoryEntry({"value": torch.ones(4)}, {"a": {}})
        >>> one = MemoryWrite("Codebook", {}, {"a": entry}, replaced={"a": None})
        >>> other = MemoryWrite("Codebook", {}, {"a": None}, replaced={"a": entry})
        >>> [row] = entry_rows(one, other)
        >>> row.first, row.norm_first, row.second, row.is_same
        ('added', 2.0, 'removed', False)
    """
    edits = (one, other)
    touched = [name for edit in edits if edit is not None for name in edit.entries]
    for name in dict.fromkeys(touched):
        (first, a), (second, b) = (_change(edit, name) for edit in edits)
        written = a or b
        yield EntryRow(
            name,
            tuple(written.requests) if written is not None else (),
            first,
            second,
            None if a is None else _norm(a),
            None if b is None else _norm(b),
            _same(a, b) if first and second else None,
        )


def memory_change(one: nn.Module, other: nn.Module) -> MemoryWrite | None:
    """The edit that brings the memory of one model to that of another; None if neither has any."""
    before, after = EditMemory.find(one), EditMemory.find(other)
    if before is None:
        return None if after is None else MemoryWrite.of(other)
    return MemoryWrite.between(before, {} if after is None else after.entries)


def memory_as_found(model: nn.Module, edit: MemoryWrite) -> tuple[MemoryWrite, str]:
    """What a model's memory holds of the entries of an edit, and what that says in words.

    Args:
        model: The model.
        edit: The edit.
    """
    memory = EditMemory.find(model)
    held = memory.entries if memory is not None else {}
    found = {name: held.get(name) for name in edit.entries}
    if all(_same(entry, edit.entries[name]) for name, entry in found.items()):
        note = "The edit is in the model."
    elif memory is None:
        note = "The model has no memory: the edit is not in it."
    elif all(_same(entry, edit.replaced.get(name)) for name, entry in found.items()):
        note = "The model's memory is here as it was before: the edit is not in it."
    else:
        note = "The model's memory is here neither as it was before nor as this edit alone left it."
    present = {name: entry for name, entry in found.items() if entry is not None}
    replaced = {name: edit.replaced[name] for name in present if name in edit.replaced}
    return MemoryWrite(edit.kind, edit.settings, present, replaced=replaced), note


def _change(edit: MemoryWrite | None, name: str) -> tuple[EntryChange | None, MemoryEntry | None]:
    """What an edit does to an entry, and the entry that it leaves."""
    if edit is None or name not in edit.entries:
        return None, None
    entry = edit.entries[name]
    if entry is None:
        return "removed", None
    if name not in edit.replaced:
        return "written", entry
    return ("added" if edit.replaced[name] is None else "replaced"), entry


def _same(one: MemoryEntry | None, other: MemoryEntry | None) -> bool:
    return other is None if one is None else one.equals(other)


def _norm(entry: MemoryEntry) -> float:
    tensors = entry.tensors.values()
    return math.hypot(*(float(torch.linalg.vector_norm(t.float())) for t in tensors))
