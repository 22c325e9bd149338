# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Saved edits of either kind come in by one door, and by no door that is another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_edit import Edit, MemoryWrite, WeightDelta
from lightning_edit.core.errors import ArtifactError
from tests.sealed import rewrite


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
    rewrite(delta, "kind")
    assert isinstance(Edit.load(delta), WeightDelta)


@pytest.mark.parametrize("cls", [Edit, WeightDelta, MemoryWrite])
def test_an_unknown_kind_is_told(cls: type[Edit], tmp_path: Path) -> None:
    delta, _ = _saved(tmp_path)
    rewrite(delta, kind="prompt")
    with pytest.raises(ArtifactError, match=r"of the kind 'prompt', which .* does not know.*-U"):
        cls.load(delta)
