# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editing weights that two processes have in parts gives what one process gives."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from safetensors.torch import load_file

import lightning_edit
from lightning_edit import EditModule
from lightning_edit.core.errors import EditError, ModelError
from lightning_edit.demos import tiny_requests, tiny_tokenizer
from lightning_edit.modules.locate_then_edit.base import LocateModule
from lightning_edit.modules.sharded import prepare_strategy, shard_model
from tests import zoo
from tests.contract.enumeration import EDITORS, quick_editor
from tests.distributed import shards
from tests.modules.helpers import bare_trainer, same, snapshot
from tests.processes import run_group, run_pair
from tests.runs import TinyWorld, metrics_of

pytestmark = [
    # ROME on a tiny model shares directions among its few keys, which it says.
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

# Cases in which `make test` tries a way; all others are slow.
QUICK = {"FSDP2": ["memit"], "TP": [], "FSDP2+TP": []}
# Partial sums of a product come in another order, to which each search reacts in its own way.
CLOSE = {"FSDP2": 1e-6, "TP": 5e-3, "FSDP2+TP": 5e-3}


def cases_of(way: str) -> list[str]:
    """Cases whose editors work with a way of dividing weights."""
    return [
        name
        for name, (method, settings, *_) in shards.CASES.items()
        if way in getattr(lightning_edit, method).edits_shards
        and not (way != "FSDP2" and settings.get("parameters") == "all")
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def done(world: TinyWorld) -> Callable[[str, tuple[str, ...]], Path]:
    """Folder of what two processes did in some cases, and what one did."""

    @functools.cache
    def alone(case: str) -> None:
        own = world.folder / "one" / case
        found = shards.edit(case, world.model, own, "one")
        shards.interrupt(case, world.model, own / "interrupted", "one")
        (own / "0.json").write_text(json.dumps(found))

    @functools.cache
    def folder_of(way: str, cases: tuple[str, ...]) -> Path:
        for case in cases:
            alone(case)
        count = math.prod(shards.WAYS[way])
        run_group(count, shards.edit_all, cases, world.model, world.folder, way)
        return world.folder

    return folder_of


def distance(one: Path, other: Path) -> float:
    """Largest relative distance of the tensors of two files."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / a[n].norm().clamp_min(1e-30)) for n in a)


def compare(folder: Path, way: str, case: str, model: Path) -> None:
    """Compares what two processes did in a case with what one did."""
    alone = folder / "one" / case
    one: dict[str, Any] = json.loads((alone / "0.json").read_text())
    step = folder / way / case / "interrupted" / "step-2.ckpt"
    shards.go_on(case, model, alone / f"from_{way}", "one", step)
    texts: dict[str, Any] = {}
    files = [alone / f"from_{way}" / "kept-0.safetensors"]
    for rank in range(math.prod(shards.WAYS[way])):
        two: dict[str, Any] = json.loads((folder / way / case / f"{rank}.json").read_text())
        own, kept = folder / way / case, f"kept-{rank}.safetensors"
        files += [own / kept, own / "resumed" / kept, own / "from_one" / kept]
        assert set(two["reverted"]) == {two["base"]} == {one["base"]}
        for name in ("steps", "history"):
            assert two[name] == one[name]
        assert two["resumed"] == two["from_one"] == one["history"]
        assert two["rows"].keys() == one["rows"].keys()
        for name in ("validated", "tested"):
            assert two[name] == pytest.approx(one[name], abs=1e-3), name
        for key, (before, after, n) in one["rows"].items():
            close = pytest.approx([before, after], rel=CLOSE[way], abs=1e-6)
            assert (two["rows"][key][:2], two["rows"][key][2]) == (close, n), key
        texts |= {row["id"]: row for row in two["texts"]}  # a process returns those of its share
    assert texts.keys() == {row["id"] for row in one["texts"]}
    assert way != "FSDP2" or all(texts[row["id"]] == row for row in one["texts"])
    for file in files:
        assert distance(alone / "kept-0.safetensors", file) <= CLOSE[way], file


@pytest.mark.parametrize("way", ["FSDP2"])
def test_divided_weights_are_edited_as_whole_ones(
    way: str, world: TinyWorld, done: Callable[[str, Sequence[str]], Path]
) -> None:
    for case in QUICK[way]:
        compare(done(way, tuple(QUICK[way])), way, case, world.model)


@pytest.mark.slow
@pytest.mark.parametrize("locates", [True, False])
@pytest.mark.parametrize("way", ["FSDP2", "TP", "FSDP2+TP"])
def test_all_editors_of_divided_weights(
    way: str,
    locates: bool,
    world: TinyWorld,
    done: Callable[[str, Sequence[str]], Path],
    subtests: pytest.Subtests,
) -> None:
    others = [case for case in cases_of(way) if case not in QUICK[way]]
    method = {case: getattr(lightning_edit, shards.CASES[case][0]) for case in others}
    cases = tuple(case for case in others if issubclass(method[case], LocateModule) == locates)
    folder = done(way, cases)
    for case in cases:
        with subtests.test(case):
            compare(folder, way, case, world.model)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["FSDP2", "TP"])
def test_models_of_all_kinds_are_divided(
    way: str, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    shards.edit_kinds(tmp_path, "one")
    run_pair(shards.edit_kinds, tmp_path, way)
    divided = []
    for kind in zoo.DECODERS:
        with subtests.test(kind):
            refused = tmp_path / way / f"{kind}.txt"
            if way == "TP" and refused.exists():
                assert "Divide the model by FSDP2" in refused.read_text()
                continue
            for rank in range(2):
                file = f"{kind}-{rank}.safetensors"
                error = distance(tmp_path / "one" / f"{kind}-0.safetensors", tmp_path / way / file)
                assert error <= CLOSE[way]
            divided.append(kind)
    assert "llama" in divided


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp2", "tp"])
def test_the_command_line_divides_weights(world: TinyWorld, tmp_path: Path, way: str) -> None:
    ran = world.run(tmp_path / "run", "-c", f"trainer/{way}")
    assert ran.returncode == 0, ran.stderr
    assert metrics_of(tmp_path / "run")["reliability/teacher_forced"]["n"] == 5


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
    assert seconds < shards.PATIENCE
    assert said.startswith("Process 0 of 2 was left alone in an edit of ROME")


def strategies(data: int, tensor: int) -> Any:
    """A strategy whose groups have these sizes, without its processes."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Group:
        def __init__(self, size: int) -> None:
            self._size = size

        def size(self) -> int:
            return self._size

    strategy = ModelParallelStrategy(data, tensor)
    mesh: Any = {"data_parallel": Group(data), "tensor_parallel": Group(tensor)}
    strategy._device_mesh = mesh
    return strategy


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_flat_copies_of_weights_are_refused(strategy: type[Any]) -> None:
    trainer: Any = bare_trainer()
    trainer._accelerator_connector.strategy = object.__new__(strategy)
    with pytest.raises(EditError, match=r"keeps flat copies of the weights.*`ModelParallelStr"):
        prepare_strategy(trainer, quick_editor(lightning_edit.ROME))


def test_what_does_not_work_with_divided_weights_is_refused(subtests: pytest.Subtests) -> None:
    trainer: Any = bare_trainer()
    for cls in EDITORS.values():
        editor: EditModule[Any] = quick_editor(cls)
        for data, tensor in ((2, 1), (1, 2), (2, 2)):
            way = "FSDP2" if tensor == 1 else "TP" if data == 1 else "FSDP2+TP"
            trainer._accelerator_connector.strategy = strategies(data, tensor)
            with subtests.test(cls.__name__, data=data, tensor=tensor):
                if way in cls.edits_shards:
                    prepare_strategy(trainer, editor)
                    continue
                with pytest.raises(EditError, match=cls.__name__):
                    prepare_strategy(trainer, editor)


def test_a_model_that_cannot_be_divided_is_refused() -> None:
    rows, columns = (strategies(*sizes)._device_mesh for sizes in ((2, 1), (1, 2)))
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
