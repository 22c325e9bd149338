# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a process has whole of weights that lie in parts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_edit import load_model
from lightning_edit.core import sharding
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.sharding import leave_files_, lies_in_parts, shard_
from lightning_edit.demos import tiny_model
from tests import zoo


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    meeting = (tmp_path / "group").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="tells of mappings by /proc")
@pytest.mark.parametrize("is_written", [False, True])
def test_weights_leave_the_file_they_were_mapped_from(is_written: bool, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    before = sharding._untouched_files()
    assert any(next(model.parameters()).data_ptr() in one for one in before)
    if is_written:  # into the mapping, of which the file knows nothing
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
    expected, names = weight_hash(model), [name for name, _ in model.named_parameters()]
    leave_files_(model)
    assert weight_hash(model) == expected
    assert [name for name, _ in model.named_parameters()] == names  # tied ones are one, still
    left = [one for p in model.parameters() for one in before if p.data_ptr() in one]
    assert bool(left) == is_written


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_matrix_at_a_time_is_whole_on_the_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    monkeypatch.setattr(sharding, "_LARGE", 1)
    model, ids = zoo.build(kind), torch.arange(5)[None]
    tree, whole = ModelTree.of(model), list[str]()
    with torch.no_grad():
        before = model(ids).logits
        shard_(model, tree.blocks, init_device_mesh("cpu", (1,)))

        def look(module: nn.Module, _: object) -> None:
            named = tree.blocks[1].named_parameters()
            found = [n for n, p in named if p.ndim == 2 and not lies_in_parts(p)]
            whole.extend(found)
            assert len(found) == 1

        tree.mlp_site(1).module(model).register_forward_pre_hook(look)
        assert torch.equal(model(ids).logits, before)
    assert whole == [tree.mlp_site(1).name.removeprefix(f"{tree.block_names[1]}.")]
