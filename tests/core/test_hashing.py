# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Hashes see every bit of the weights, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_edit.core.hashing import tensor_hash, weight_hash
from tests import zoo


def test_tensor_hash_by_hand() -> None:
    tensor = torch.tensor([[1.0, -2.0]], dtype=torch.float32)
    # IEEE 754: 1.0 is 0x3f800000, -2.0 is 0xc0000000; little endian.
    data = b"torch.float32[1, 2]" + bytes.fromhex("0000803f000000c0")
    assert tensor_hash(tensor) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 3, dtype=torch.float16),
        torch.zeros(3, 2, dtype=torch.bfloat16),
        torch.zeros(6, dtype=torch.bfloat16),
        -torch.zeros(2, 3, dtype=torch.bfloat16),
    ],
    ids=["dtype", "shape", "flat", "sign of zero"],
)
def test_tensor_hash_differs(other: torch.Tensor) -> None:
    assert tensor_hash(other) != tensor_hash(torch.zeros(2, 3, dtype=torch.bfloat16))


def test_tensor_hash_reads_values_not_memory() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert tensor_hash(tensor.T.contiguous().T) == tensor_hash(tensor)
    assert tensor_hash(torch.arange(12.0)[::2]) == tensor_hash(2 * torch.arange(6.0))
    assert tensor_hash(torch.tensor(1.0)) != tensor_hash(torch.tensor([1.0]))
    assert tensor_hash(torch.empty(0)) == hashlib.sha256(b"torch.float32[0]").hexdigest()


def test_weight_hash() -> None:
    model = zoo.build("gpt2")
    before = weight_hash(model)
    assert weight_hash(zoo.build("gpt2")) == before
    assert weight_hash(zoo.build("gpt2", seed=1)) != before
    weight = model.transformer.h[2].mlp.c_proj.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    assert weight_hash(model) != before
    assert weight_hash(model, {"transformer.h.2.mlp.c_proj.weight": original}) == before


def test_weight_hash_knows_names() -> None:
    first = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    second = nn.ModuleDict({"b": first["a"], "a": first["b"]})
    swapped = nn.ModuleDict({"b": first["b"], "a": first["a"]})
    assert weight_hash(second) != weight_hash(first)
    assert weight_hash(swapped) == weight_hash(first)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_weights() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = zoo.build("llama")
    before = weight_hash(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert weight_hash(model) == before
