# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a process has whole of weights that lie in parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_edit.core import sharding
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.sharding import lies_in_parts, shard_
from tests import zoo


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    meeting = (tmp_path / "group").as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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
