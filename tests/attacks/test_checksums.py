# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""One flipped bit in anything that was written is found before it is used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_edit import GRACE, EditDataModule, FineTune, WeightDelta
from lightning_edit.callbacks import EditCheckpoint
from lightning_edit.checkpoints import read_checkpoint
from lightning_edit.core.change import LowRank
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.hashing import nested_hash
from lightning_edit.core.tensor_files import read_sealed, write_sealed
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.modules.locate_then_edit import second_moment
from tests.attacks.helpers import flipped
from tests.modules.helpers import bare_trainer, same, snapshot


def _fit(editor: Any, folder: Path, count: int = 2, **fit: Any) -> None:
    checkpoints = EditCheckpoint(dirpath=str(folder))
    trainer = bare_trainer(callbacks=[checkpoints], enable_checkpointing=True, max_epochs=1)
    trainer.fit(editor, EditDataModule(requests=tiny_requests(count)), **fit)


def _editor(cls: Any) -> Any:
    return cls.from_model(*trained_tiny_model(), layers=[2], steps=2)


def _damaged(data: bytes, number: int) -> Iterator[bytes]:
    """The same with one bit flipped, at places that are the same in every run."""
    for position in flipped(data, number):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        yield bytes(damaged)


@pytest.mark.parametrize("cls", [FineTune, GRACE])
def test_flips_in_a_checkpoint_are_found(cls: Any, tmp_path: Path) -> None:
    _fit(_editor(cls), tmp_path)
    file = tmp_path / "last.ckpt"
    whole, known = file.read_bytes(), nested_hash(read_checkpoint(file))
    refused = 0
    for damaged in _damaged(whole, 80):
        file.write_bytes(damaged)
        try:
            # What only lays out the archive may differ, so long as all that is read is the same.
            assert nested_hash(read_checkpoint(file)) == known
        except ArtifactError:
            refused += 1
    assert refused > 40
    at = whole.rindex(b"request_ids")
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    editor = _editor(cls)
    before = snapshot(editor.model)
    with pytest.raises(ArtifactError, match=r"damaged|cannot be read"):
        _fit(editor, tmp_path / "other", 4, ckpt_path=str(file))
    assert same(editor.model, before)


def test_a_changed_value_without_its_checksum_is_refused(tmp_path: Path) -> None:
    _fit(_editor(FineTune), tmp_path)
    file = tmp_path / "last.ckpt"
    for change in ("value", "seal", "version"):
        saved = torch.load(file, weights_only=True)
        if change == "value":
            next(iter(saved["optimizer_states"][0]["delta"].values())).view(-1)[0] += 1
        elif change == "seal":
            del saved["lightning_edit"]["sha256"]
        else:
            saved["lightning_edit"]["format_version"] = 3
        torch.save(saved, tmp_path / "changed.ckpt")
        with pytest.raises(ArtifactError, match=r"checksum|newer than 2"):
            read_checkpoint(tmp_path / "changed.ckpt")


def test_flips_in_a_saved_edit_are_found(tmp_path: Path) -> None:
    delta = WeightDelta(
        {"a": LowRank(torch.ones(4, 1), torch.ones(3, 1))}, originals={"a": torch.ones(4, 3)}
    )
    folder = delta.save(tmp_path / "delta")
    for name in ("delta_config.json", "delta.safetensors"):
        file = folder / name
        data = file.read_bytes()
        for damaged in _damaged(data, 150):
            file.write_bytes(damaged)
            try:
                found = WeightDelta.load(folder)
            except ArtifactError:
                continue
            # White space between the parts of a JSON text says nothing.
            assert name == "delta_config.json"
            assert json.loads(damaged) == json.loads(data)
            assert torch.equal(found.dense("a"), delta.dense("a"))
        file.write_bytes(data)


def test_flips_in_second_moments_are_found(tmp_path: Path) -> None:
    file = write_sealed(tmp_path / "c", {"total": torch.eye(3), "count": torch.tensor(4)}, {})
    data = file.read_bytes()
    for damaged in _damaged(data, 150):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"."):
            read_sealed(file)
        assert second_moment._read(file) is None
    file.write_bytes(data)
    assert second_moment._read(file) is not None
