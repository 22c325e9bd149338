# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Writes into a memory: sums, exact undo, files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_edit import EditMemory, MemoryWrite, WeightDelta
from lightning_edit.core.errors import ArtifactError, EditError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.core.side_memory import MemoryEntry
from tests.sealed import rewrite


class Biases(EditMemory):
    """Adds the sum of its rows to a layer's output."""

    fields: ClassVar[tuple[str, ...]] = ("bias",)
    bias: Tensor

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(scale=scale)

    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        return [model.register_forward_hook(self._add)]

    def _add(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        return None if self.is_off else output + self.settings["scale"] * self.bias.sum(0)


def _entry(value: float, *requests: str) -> MemoryEntry:
    kept = {name: {"prompt": f"about {name}"} for name in requests}
    return MemoryEntry({"bias": torch.full((2,), float(value))}, kept, {"value": value})


def _write(**entries: MemoryEntry | None) -> MemoryWrite:
    return MemoryWrite("Biases", {"scale": 1.0}, entries)


def _held(model: nn.Module) -> dict[str, list[float]]:
    memory = EditMemory.find(model)
    entries = {} if memory is None else memory.entries
    return {name: entry.tensors["bias"].tolist() for name, entry in entries.items()}


def test_a_model_gets_its_memory_with_the_first_edit_and_loses_it_with_the_last() -> None:
    layer = nn.Linear(2, 2)
    inputs = torch.ones(1, 2)
    before = layer(inputs)
    first, second = _write(a=_entry(1.0, "a")), _write(b=_entry(2.0, "b"), a=_entry(3.0, "a"))
    first.apply_(layer)
    torch.testing.assert_close(layer(inputs), before + 1)
    second.apply_(layer)
    assert _held(layer) == {"a": [3.0, 3.0], "b": [2.0, 2.0]}
    torch.testing.assert_close(layer(inputs), before + 5)
    with pytest.raises(ArtifactError, match="'a' of this memory is not what this edit wrote"):
        first.revert_(layer)
    second.revert_(layer)
    assert _held(layer) == {"a": [1.0, 1.0]}
    first.revert_(layer)
    assert torch.equal(layer(inputs), before)
    assert EditMemory.find(layer) is None
    assert not layer._forward_hooks
    with pytest.raises(ArtifactError, match="has no memory: the edit is not applied here"):
        first.revert_(layer)


def test_the_order_of_entries_comes_back(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    _write(a=_entry(1, "a"), b=_entry(2, "b"), c=_entry(3, "c")).apply_(layer)
    removal = MemoryWrite.removing(layer, ["a", "b"])
    removal.apply_(layer)
    _write(d=_entry(4, "d")).apply_(layer)
    assert list(_held(layer)) == ["c", "d"]
    removal.save(tmp_path / "removal")
    MemoryWrite.load(tmp_path / "removal").revert_(layer)
    assert list(_held(layer)) == ["a", "b", "c", "d"]
    with removal.applied(layer):
        assert list(_held(layer)) == ["c", "d"]
    assert list(_held(layer)) == ["a", "b", "c", "d"]


def test_a_sum_does_what_its_parts_do() -> None:
    parts = [
        _write(a=_entry(1, "a"), b=_entry(2, "b")),
        _write(a=None),
        _write(c=_entry(3, "c"), a=_entry(4, "a"), b=_entry(5, "b")),
    ]
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    for part in parts:
        part.apply_(one)
    total = parts[0] + parts[1] + parts[2]
    total.apply_(other)
    assert list(_held(one).items()) == list(_held(other).items())
    assert list(_held(one)) == ["b", "c", "a"]
    assert total.norm() == pytest.approx((2 * (25 + 9 + 16)) ** 0.5)
    assert total.nbytes == 3 * 2 * 4


def test_a_request_leaves_the_entries_that_it_shares() -> None:
    layer = nn.Linear(2, 2)
    _write(a=_entry(1, "a", "shared"), b=_entry(2, "b")).apply_(layer)
    memory = EditMemory.find(layer)
    assert memory is not None
    assert memory.requests["shared"] == {"entries": ["a"], "prompt": "about shared"}
    MemoryWrite.removing(layer, ["shared"]).apply_(layer)
    assert list(memory.requests) == ["a", "b"]
    with pytest.raises(EditError, match=r"no edit with the id 'shared'. It holds a, b"):
        memory.without(["shared"])
    with pytest.raises(ArtifactError, match="takes away 'x', which this memory does not hold"):
        _write(x=None).apply_(layer)
    assert list(memory.requests) == ["a", "b"]


def test_files_hold_all_of_it(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    base = BaseModelInfo("tiny", dtype="float32", sha256=weight_hash(layer))
    _write(a=_entry(1, "a")).apply_(layer)
    edit = _write(a=None, b=_entry(2, "b", "c"))
    edit.provenance = Provenance("Biases", base=base, request_ids=("b", "c"))
    edit.apply_(layer)
    folder = edit.save(tmp_path / "edit")
    loaded = MemoryWrite.load(folder)
    assert loaded.provenance == edit.provenance
    assert (loaded.kind, loaded.settings) == ("Biases", {"scale": 1.0})
    assert loaded.entries["a"] is None
    assert _entry(2, "b", "c").equals(loaded.entries["b"])
    loaded.revert_(layer)
    assert _held(layer) == {"a": [1.0, 1.0]}
    loaded.apply_(layer)
    bare = MemoryWrite.load(edit.save(tmp_path / "bare", originals=False))
    with pytest.raises(ArtifactError, match=r"What stood in place of 'a' was not kept"):
        bare.revert_(layer)
    card = (folder / "README.md").read_text()
    assert "| b | b, c |" in card
    assert "MemoryWrite.load" in card
    with pytest.raises(ArtifactError, match="belongs to tiny with the weight hash"):
        loaded.apply_(nn.Linear(2, 2))
    with pytest.raises(ArtifactError, match="holds an edit of a memory, not of weights"):
        WeightDelta.load(folder)
    with pytest.raises(ArtifactError, match="holds an edit of weights"):
        MemoryWrite.load(WeightDelta({}).save(tmp_path / "delta"))


def test_damaged_files_are_told(tmp_path: Path) -> None:
    folder = _write(a=_entry(1, "a"), b=_entry(2, "b")).save(tmp_path / "edit")
    config = json.loads((folder / "delta_config.json").read_text())
    broken: dict[str, Any]
    for broken in ({"entries": config["entries"][:1]}, {"memory": {}}, {"entries": [{}]}):
        rewrite(folder, **broken)
        with pytest.raises(ArtifactError, match="is damaged"):
            MemoryWrite.load(folder)
    rewrite(folder, **{**config, "memory": {"kind": "Unknown", "settings": {}}})
    with pytest.raises(ArtifactError, match="a memory of the kind 'Unknown', which is not known"):
        MemoryWrite.load(folder).apply_(nn.Linear(2, 2))


def test_a_memory_takes_only_entries_of_its_own_kind() -> None:
    layer = nn.Linear(2, 2)
    _write(a=_entry(1, "a")).apply_(layer)
    other = MemoryWrite("Biases", {"scale": 2.0}, {"b": _entry(2, "b")})
    with pytest.raises(ArtifactError, match=r"belong to a Biases with .*2\.0.*has a Biases with"):
        other.apply_(layer)
    with pytest.raises(ArtifactError, match="belong to a Biases"):
        Biases(2.0).load_state_dict(EditMemory.find(layer).state_dict())  # type: ignore[union-attr]
    with pytest.raises(EditError, match="The model has a memory already"):
        Biases().attach_(layer)
    assert _held(layer) == {"a": [1.0, 1.0]}


def test_an_interrupted_write_loses_nothing() -> None:
    layer = nn.Linear(2, 2)
    _write(a=_entry(1, "a")).apply_(layer)
    wrong = MemoryEntry({"bias": torch.zeros(3)}, {"b": {}})
    with pytest.raises(RuntimeError, match="equal size"):
        _write(b=wrong).apply_(layer)
    assert _held(layer) == {"a": [1.0, 1.0]}


def test_the_memory_moves_with_its_model() -> None:
    layer = nn.Linear(2, 2)
    _write(a=_entry(1, "a")).apply_(layer)
    layer.to("meta")
    memory = EditMemory.find(layer)
    assert memory is not None
    assert memory.get_buffer("bias").device.type == "meta"


def test_a_base_of_several_memories_is_no_kind_of_its_own() -> None:
    assert set(EditMemory.kinds) >= {"Codebook", "SideMatrices", "PatchNeurons", "PromptMemory"}
    assert "LayerMemory" not in EditMemory.kinds
