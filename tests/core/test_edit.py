# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Saved edits of either kind come in by one door, and by no door that is another's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_edit import Edit, EditMemory, MemoryWrite, WeightDelta
from lightning_edit.core.errors import ArtifactError
from lightning_edit.demos import tiny_model

#: Folders that version 0.1.0 has written.
WRITTEN = Path(__file__).parent / "written_by_0_1_0"


def _saved(folder: Path) -> tuple[Path, Path]:
    delta = WeightDelta({"weight": torch.ones(2, 2)})
    write = MemoryWrite("Codebook", {"layer": 0}, {"a": None})
    return delta.save(folder / "delta"), write.save(folder / "write")


def test_one_door_for_either_kind(tmp_path: Path) -> None:
    delta, write = (Edit.load(folder) for folder in _saved(tmp_path))
    assert isinstance(delta, WeightDelta)
    assert torch.equal(delta.dense("weight"), torch.ones(2, 2))
    assert isinstance(write, MemoryWrite)
    assert write.entries == {"a": None}


def test_a_kind_has_a_door_of_its_own(tmp_path: Path) -> None:
    delta, write = _saved(tmp_path)
    assert type(WeightDelta.load(delta)) is WeightDelta
    assert type(MemoryWrite.load(write)) is MemoryWrite
    words = r"holds an edit of a memory, not of weights. Load it with `MemoryWrite.load`, or"
    with pytest.raises(ArtifactError, match=words):
        WeightDelta.load(write)
    words = r"holds an edit of weights, not of a memory. Load it with `WeightDelta.load`, or"
    with pytest.raises(ArtifactError, match=words):
        MemoryWrite.load(delta)

    class Scaled(WeightDelta):
        """A kind of ones own, in the files of the general one."""

    assert type(Scaled.load(delta)) is Scaled


def test_a_folder_that_names_no_kind_holds_weights(tmp_path: Path) -> None:
    delta, _ = _saved(tmp_path)
    path = delta / "delta_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["kind"]
    path.write_text(json.dumps(config), encoding="utf-8")
    assert isinstance(Edit.load(delta), WeightDelta)


@pytest.mark.parametrize("cls", [Edit, WeightDelta, MemoryWrite])
def test_an_unknown_kind_is_told(cls: type[Edit], tmp_path: Path) -> None:
    delta, _ = _saved(tmp_path)
    path = delta / "delta_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "kind": "prompt"}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"of the kind 'prompt', which .* does not know.*-U"):
        cls.load(path.parent)


def test_edits_of_weights_written_by_earlier_versions() -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).view(2, 3) / 8)
        layer.bias.copy_(torch.tensor([1.0, -1.0]))
    edit = Edit.load(WRITTEN / "weights")
    assert edit.provenance.method == "ROME"
    assert edit.provenance.request_ids == ("capital-velmora",)
    edit.apply_(layer)  # knows its base by its hash
    assert layer.weight.tolist() == [[0.5, 0.125, 0.5], [1.375, 0.5, 1.125]]
    assert layer.bias.tolist() == [1.5, -0.75]
    Edit.load(WRITTEN / "weights").revert_(layer)
    assert layer.weight.tolist() == [[0.0, 0.125, 0.25], [0.375, 0.5, 0.625]]
    assert layer.bias.tolist() == [1.0, -1.0]


def test_edits_of_memories_written_by_earlier_versions() -> None:
    edit = Edit.load(WRITTEN / "memory")
    assert isinstance(edit, MemoryWrite)
    assert edit.provenance.method == "GRACE"
    assert edit.order == ("capital-velmora", "language-velmora")
    model = tiny_model()
    known = {n: e for n, e in edit.replaced.items() if e is not None}
    MemoryWrite(edit.kind, edit.settings, known).apply_(model, check=False)
    edit.apply_(model, check=False)
    memory = EditMemory.find(model)
    assert memory is not None
    assert list(memory.requests) == ["capital-velmora", "river-dorin"]
    assert memory.requests["capital-velmora"]["target"] == "Brune"
    Edit.load(WRITTEN / "memory").revert_(model)
    assert memory.requests["capital-velmora"]["target"] == "Kettleby"
    assert list(memory.requests) == ["capital-velmora"]
