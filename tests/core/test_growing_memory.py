# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A memory that grows holds what a dictionary would, and what was read of it stays as it was."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.memory_entry import Row, Rows
from lightning_edit.core.side_memory import EditMemory, MemoryEntry


class Growing(EditMemory):
    """A memory that does nothing."""

    fields: ClassVar[tuple[str, ...]] = ("keys", "sizes")
    keys: Tensor
    sizes: Tensor

    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        return []


def entry(number: int) -> MemoryEntry:
    tensors = {"keys": torch.full((3,), float(number)), "sizes": torch.tensor(float(number))}
    return MemoryEntry(tensors, {f"r{number}": {}})


def numbers(entries: dict[str, MemoryEntry]) -> dict[str, tuple[float, float]]:
    return {n: (float(e.tensors["keys"][2]), float(e.tensors["sizes"])) for n, e in entries.items()}


def test_a_memory_holds_what_a_dictionary_would() -> None:
    memory = Growing().attach_(nn.Linear(2, 2))
    draw, wanted = random.Random(0), dict[str, int]()  # noqa: S311
    seen: list[tuple[dict[str, MemoryEntry], dict[str, tuple[float, float]]]] = []
    for number in range(400):
        entries = memory.entries
        what = draw.random()
        if what < 0.7 or not entries:
            entries[f"e{number}"] = entry(number)
            wanted[f"e{number}"] = number
        elif what < 0.85:
            name = draw.choice(list(entries))
            entries[name], wanted[name] = entry(number), number
        else:
            name = draw.choice(list(entries))
            del entries[name], wanted[name]
        if number % 7 == 0:  # tried, and taken back
            with memory.kept():
                memory.write({**entries, "tried": entry(-number)})
                seen.append((memory.entries, numbers(memory.entries)))
        memory.write(entries)
        assert numbers(memory.entries) == {n: (float(i), float(i)) for n, i in wanted.items()}
        assert memory.keys[:, 0].tolist() == list(map(float, wanted.values()))
        assert list(memory.request_ids) == list(memory.requests)
        assert set(memory.request_ids) == {f"r{i}" for i in wanted.values()}
        if number % 50 == 0:
            seen.append((memory.entries, numbers(memory.entries)))
    for entries, then in seen:
        assert numbers(entries) == then


def test_adding_to_many_entries_leaves_them_where_they_are() -> None:
    model = nn.Linear(2, 2)
    memory = Growing().attach_(model)
    places, tensors = set(), list[Tensor]()
    for number in range(300):
        before = memory.entries
        edit = MemoryWrite.between(memory, {**before, f"e{number}": entry(number)})
        assert list(edit.entries) == [f"e{number}"]
        edit.apply_(model, check=False)
        places.add(memory.keys.data_ptr())
        tensors.append(memory.keys)  # so that no memory is used twice
        if number > 20 and memory.keys.data_ptr() == tensors[-2].data_ptr():
            assert all(
                one is before[name] for name, one in memory.entries.items() if name in before
            )
    assert len(places) < 30  # the first sixteen, and then each time they are twice as many


def test_an_edit_makes_as_many_entries_anew_as_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    memory = Growing().attach_(model)
    made, lengths = 0, list[int]()
    begin = Row.__init__

    def counted(self: Row, rows: Rows, number: int) -> None:
        nonlocal made
        made += 1
        begin(self, rows, number)

    monkeypatch.setattr(Row, "__init__", counted)
    for number in range(200):
        before, made = memory.entries, 0
        places = {memory.keys.data_ptr()}
        last = f"e{number - 1}"
        entries = {**before, f"e{number}": entry(number)}
        if number > 1:  # as GRACE splits the radius of the nearest entry
            shrunk = {**before[last].tensors, "sizes": torch.tensor(-1.0)}
            entries[last] = replace(before[last], tensors=shrunk)
        edit = MemoryWrite.between(memory, entries)
        edit.apply_(model, check=False)
        lengths.append(made)
        places.add(memory.keys.data_ptr())
        if number > 1:
            assert list(edit.entries) == [last, f"e{number}"]
            assert float(before[last].tensors["sizes"]) == number - 1
            assert float(memory.entries[last].tensors["sizes"]) == -1.0
            assert memory.entries["e0"] is before["e0"]
        if number in (5 + 16, 195):  # between two that make room
            assert len(places) == 1
    assert lengths[5] == lengths[199] == 2


def test_requests_of_entries_that_change_are_found() -> None:
    model = nn.Linear(2, 2)
    memory = Growing().attach_(model)
    memory.write({f"e{i}": entry(i) for i in range(4)})
    _ = memory.request_ids
    entries = memory.entries
    entries["e3"] = replace(entries["e3"], requests={"r3": {}, "r0": {}})
    memory.write(entries)
    assert memory.requests["r0"]["entries"] == ["e0", "e3"]
    entries = memory.entries
    entries["e0"] = replace(entries["e0"], requests={"new": {}})
    entries["e1"] = replace(entries["e1"], requests={"r0": {}})
    memory.write(entries)
    assert memory.requests["r0"]["entries"] == ["e1", "e3"]
    assert set(memory.request_ids) == {"new", "r0", "r2", "r3"}
