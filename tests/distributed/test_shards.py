# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editing weights that two processes have in parts gives what one process gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from safetensors.torch import load_file

import lightning_edit
from lightning_edit.core.errors import EditError, ModelError
from lightning_edit.demos import tiny_requests, tiny_tokenizer
from lightning_edit.modules.sharded import prepare_strategy, shard_model
from tests import zoo
from tests.contract.enumeration import quick_editor
from tests.distributed import shards
from tests.distributed.editing import PATIENCE, strategy_without_processes
from tests.distributed.matrix import CLOSE, distance, run_cases
from tests.modules.helpers import bare_trainer, same, snapshot
from tests.processes import run_pair
from tests.runs import TinyWorld

pytestmark = [
    # ROME on a tiny model shares directions among its few keys, which it says.
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of models of all kinds, and of what one process made of them."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind in zoo.DECODERS:
        shards.edit_kind(kind, folder / "one", "one", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", ["FSDP2", "TP"])
def test_models_of_all_kinds_are_divided(way: str, kinds: Path, subtests: pytest.Subtests) -> None:
    failed = run_cases(2, shards.edit_kind, zoo.DECODERS, kinds / way, way, kinds)
    divided = []
    for kind in zoo.DECODERS:
        with subtests.test(kind):
            assert kind not in failed, failed[kind]
            refused = kinds / way / f"{kind}.txt"
            if way == "TP" and refused.exists():
                assert "Divide the model by FSDP2" in refused.read_text()
                continue
            for rank in range(2):
                one, two = (
                    kinds / name / f"{kind}-{n}.safetensors"
                    for name, n in (("one", 0), (way, rank))
                )
                assert distance(one, two) <= CLOSE[way]
            divided.append(kind)
    assert "llama" in divided


def test_matrices_may_be_gathered_one_by_one(world: TinyWorld, tmp_path: Path) -> None:
    """As large ones are on the CPU; those of the tiny model come a block at a time."""
    shards.edit_large(world.model, tmp_path / "one", "one")
    run_pair(shards.edit_large, world.model, tmp_path)
    for case in shards.LARGE:
        for rank in range(2):
            one = tmp_path / "one" / f"{case}-0.safetensors"
            assert distance(one, tmp_path / f"{case}-{rank}.safetensors") <= CLOSE["FSDP2"]
    alone = load_file(tmp_path / "one" / "moment-0.safetensors")
    shares = [load_file(tmp_path / f"moment-{rank}.safetensors") for rank in range(2)]
    assert torch.equal(alone["share"], alone["whole"])
    assert torch.equal(torch.cat([two["share"] for two in shares]), shares[0]["whole"])
    assert len(shares[0]["share"]) == len(alone["whole"]) // 2
    for two in shares:
        torch.testing.assert_close(two["whole"], alone["whole"])


def test_no_whole_matrix_is_gathered_to_edit_rows(world: TinyWorld, tmp_path: Path) -> None:
    run_pair(shards.count_gathers, world.model, tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["rome_batches"] == [0, 0, 0]
        assert found["memit"] == [0, 0]
        assert min(found["fine_tune"]) > 0  # so that the counter is seen to count


def test_a_run_stops_where_processes_edit_differently(world: TinyWorld, tmp_path: Path) -> None:
    run_pair(shards.tamper, world.model, tmp_path)
    for rank in range(2):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert said.startswith("1: The processes have committed different edits: `model.layers.0")


def test_a_run_ends_when_a_process_is_gone(world: TinyWorld, tmp_path: Path) -> None:
    run_pair(shards.leave, world.model, tmp_path)
    edits, seconds, said = json.loads((tmp_path / "said.json").read_text())
    assert edits == 1
    assert seconds < PATIENCE
    assert said.startswith("Process 0 of 2 was left alone in an edit of ROME")


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_flat_copies_of_weights_are_refused(strategy: type[Any]) -> None:
    trainer: Any = bare_trainer()
    trainer._accelerator_connector.strategy = object.__new__(strategy)
    with pytest.raises(EditError, match=r"keeps flat copies of the weights.*`ModelParallelStr"):
        prepare_strategy(trainer, quick_editor(lightning_edit.ROME))


def test_a_model_that_cannot_be_divided_is_refused() -> None:
    rows, columns = (strategy_without_processes(*sizes)._device_mesh for sizes in ((2, 1), (1, 2)))
    for kind, mesh, reason in (
        ("t5", rows, "has an encoder"),
        ("gpt2", columns, "does not say how to divide them"),
    ):
        model = zoo.build(kind)
        kept = snapshot(model)
        editor = lightning_edit.FineTune.from_model(model, tiny_tokenizer())
        editor._device_mesh = mesh
        with pytest.raises(ModelError, match=reason):
            shard_model(editor)
        assert same(model, kept)
    editor = quick_editor(lightning_edit.FineTune)
    editor.commit(editor.edit(tiny_requests(1)))
    editor._device_mesh = rows
    with pytest.raises(EditError, match="has committed edits to a whole model"):
        shard_model(editor)
