# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Every editor under every strategy that it declares does what it does on one process."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

import lightning_edit
from lightning_edit import GRACE, MEND, SCR, Edit, EditModule, MemoryWrite, WeightDelta
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests
from tests.contract.enumeration import RememberingEditor, quick_editor, trained_editor
from tests.distributed import editing
from tests.distributed.editing import CASES, REMOVING, WAYS
from tests.distributed.matrix import CLOSE, asked_in, distance, run_cases
from tests.modules.helpers import bare_trainer, same_edit
from tests.runs import TinyWorld, metrics_of

pytestmark = [
    # ROME on a tiny model shares directions among its few keys, which it says.
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

# How far saved changes may be from those of one process, relative to them: they are smaller than
# the weights, whose rounding they carry.
CHANGE = {"ddp": 1e-4, "FSDP2": 1e-4, "TP": 5e-3, "FSDP2+TP": 5e-3}
# How far figures may be; the counts that they are of are the same.
FIGURE = {"ddp": 1e-4, "FSDP2": 1e-6, "TP": 5e-3, "FSDP2+TP": 5e-3}
# The same of `validate` and `test`.
ABSOLUTE = {"ddp": 1e-6, "FSDP2": 1e-3, "TP": 1e-3, "FSDP2+TP": 1e-3}
# Cases that continuous integration asks for on every system; `make test-distributed` asks for all.
QUICK = {"ddp": ("rome_batches", "fine_tune", "grace", "loc_ft"), "FSDP2": ("memit",)}
# Of those of four processes, which take longest, `make test-slow` asks for the others.
SOME = ("rome_batches", "memit", "fine_tune", "grace")


def marks_of(way: str, case: str) -> list[pytest.MarkDecorator]:
    """When a case runs: always, in `make test-distributed`, or in `make test-slow`."""
    if case in QUICK.get(way, ()):
        return []
    return [
        pytest.mark.slow,
        *([pytest.mark.exhaustive] if "+" in way and case not in SOME else []),
    ]


# Each case under each strategy that its editor declares.
CELLS = [
    pytest.param(
        way,
        case,
        id=f"{way}-{case}",
        marks=marks_of(way, case),
    )
    for way in CLOSE
    for case, (method, *_) in CASES.items()
    if way in getattr(lightning_edit, method).strategies
]


class Ran(NamedTuple):
    """What several processes and one did in a case."""

    own: Path
    alone: Path
    group: list[dict[str, Any]]
    one: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def ran(world: TinyWorld, request: pytest.FixtureRequest) -> Callable[[str, str], Ran]:
    """What was done in a case under a strategy.

    The first question has one group of processes do all cases of the strategy that are asked for.
    """
    asked = asked_in(request)

    @functools.cache
    def alone(case: str) -> dict[str, Any]:
        own = world.folder / "one" / case
        if CASES[case][0] == "TrainedEditor":
            shutil.copy(trained_editor("trained", MEND), world.folder / editing.TRAINED)
        try:
            found = editing.edit(case, world.model, own, "one")
            editing.interrupt(case, world.model, own / "interrupted", "one")
        except Exception as error:
            error.add_note(f"{case} in one process")
            raise
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain

    @functools.cache
    def together(way: str) -> dict[str, str]:
        cases = [case for other, case in asked if other == way]
        for case in cases:
            alone(case)
        count, folder = math.prod(WAYS[way]), world.folder / way
        job = editing.edit_as_one_of_a_group
        return run_cases(count, job, cases, folder, way, world.model, world.folder / "one")

    def of(way: str, case: str) -> Ran:
        said = together(way).get(case)
        if said is not None:
            pytest.fail(f"{case} under {way}: {said}", pytrace=False)
        own = world.folder / way / case
        files = [own / f"{rank}.json" for rank in range(math.prod(WAYS[way]))]
        group = [json.loads(file.read_text()) for file in files]
        return Ran(own, world.folder / "one" / case, group, alone(case))

    return of


def changes_in(run: Path) -> dict[str, torch.Tensor]:
    """What the edit that a run has saved changes or adds, by name."""
    edit = Edit.load(run / "delta")
    if isinstance(edit, WeightDelta):
        return {name: edit.dense(name) for name in edit.changes}
    assert isinstance(edit, MemoryWrite)
    return {
        f"{name}.{field}": tensor
        for name, entry in edit.entries.items()
        if entry is not None
        for field, tensor in entry.tensors.items()
    }


def bound(way: str, case: str) -> float:
    """How far the weights of several processes may be from those of one in a case."""
    # Adapters begin at zero, where Adam takes whole steps by gradients that are next to nothing.
    return 1e-5 if (way, case) == ("ddp", "lora_tuning") else CLOSE[way]


@pytest.mark.parametrize(("way", "case"), CELLS)
def test_fit_gives_the_weights_of_one_process(
    way: str, case: str, ran: Callable[[str, str], Ran]
) -> None:
    own, alone, group, one = ran(way, case)
    for rank, found in enumerate(group):
        for name in ("steps", "history"):
            assert found[name] == one[name], name
        assert found["kept"] == group[0]["kept"]
        file = f"kept-{rank}.safetensors"
        assert distance(alone / "kept-0.safetensors", own / file) <= bound(way, case)
    _, _, batch_size, epochs = CASES[case]
    assert one["steps"] == -(-5 // batch_size) * epochs


@pytest.mark.parametrize(
    ("way", "case"), [cell for cell in CELLS if editing.is_measured(*map(str, cell.values))]
)
def test_figures_are_those_of_one_process(
    way: str, case: str, ran: Callable[[str, str], Ran]
) -> None:
    _, _, group, one = ran(way, case)
    texts: dict[str, Any] = {}
    for found in group:
        assert found["rows"].keys() == one["rows"].keys()
        for key, (before, after, n) in one["rows"].items():
            close = pytest.approx([before, after], rel=FIGURE[way], abs=1e-5)
            assert (found["rows"][key][:2], found["rows"][key][2]) == (close, n), key
        for verb in ("validated", "tested"):
            if found[verb]:
                assert found[verb] == pytest.approx(one[verb], abs=ABSOLUTE[way]), verb
        assert len(found["sequence"]) == len(one["sequence"])
        for point, other in zip(found["sequence"], one["sequence"], strict=True):
            assert point.keys() == other.keys()
            assert point.get("edits") == other.get("edits")
        texts |= {row["id"]: row for row in found["texts"]}  # a process returns those of its share
    assert texts.keys() == {row["id"] for row in one["texts"]}
    assert "TP" in way or all(texts[row["id"]] == row for row in one["texts"])


@pytest.mark.parametrize(("way", "case"), CELLS)
def test_save_writes_one_edit_of_all_requests(
    way: str, case: str, ran: Callable[[str, str], Ran]
) -> None:
    own, alone, *_ = ran(way, case)
    two, one = changes_in(own), changes_in(alone)
    assert two.keys() == one.keys()
    for name, change in one.items():
        error = torch.linalg.vector_norm((two[name] - change).float())
        assert error <= CHANGE[way] * torch.linalg.vector_norm(change.float()), name
    assert len(Edit.load(own / "delta").provenance.request_ids) == 5
    if editing.is_measured(way, case):
        metrics = metrics_of(own)
        assert metrics["reliability/teacher_forced"]["n"] == 5
        assert metrics["generality/autoregressive"]["n"] == 10
        assert len((own / "edits.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(("way", "case"), CELLS)
def test_resume_ends_as_without_an_interruption(
    way: str, case: str, world: TinyWorld, ran: Callable[[str, str], Ran]
) -> None:
    own, alone, group, one = ran(way, case)
    step = own / "interrupted" / "step-2.ckpt"
    files = [alone / f"from_{way}" / "kept-0.safetensors"]
    single = editing.go_on(case, world.model, files[0].parent, "one", step)
    for rank, found in enumerate(group):
        for name in ("resumed", "from_one"):
            files.append(own / name / f"kept-{rank}.safetensors")
            assert found[name]["history"] == one["history"] == single["history"]
            assert found[name]["kept"] == group[0][name]["kept"]
        assert found["resumed"]["kept"] == found["kept"]  # the very bits
        for rows in found["resumed"]["rows"]:
            assert rows == found["rows"]
    for file in files:
        assert distance(alone / "kept-0.safetensors", file) <= bound(way, case), file


@pytest.mark.parametrize(("way", "case"), CELLS)
def test_revert_gives_the_base_back(way: str, case: str, ran: Callable[[str, str], Ran]) -> None:
    own, alone, group, one = ran(way, case)
    ids = [request.id for request in tiny_requests(5)]
    for rank, found in enumerate(group):
        assert set(found["reverted"]) == {found["base"]} == {one["base"]}
        assert found["left"] == one["left"] == 0
        if case in REMOVING:
            assert found["removed"] == group[0]["removed"]
            assert found["removed"]["of"] == [ids[1]]
            assert found["removed"]["history"] == [ids[0], *ids[2:]]
            assert found["removed"]["kept"] != found["kept"]
            file = Path("removed", f"kept-{rank}.safetensors")
            assert distance(alone / "removed" / "kept-0.safetensors", own / file) <= bound(
                way, case
            )


@pytest.mark.parametrize("cls", [GRACE, SCR, RememberingEditor])
def test_an_editor_may_be_older_than_its_group(cls: type[EditModule[Any]]) -> None:
    edits = []
    for strategy in ("auto", "ddp"):
        editor = quick_editor(cls)  # nothing in it is trained, which `ddp` would refuse
        trainer = bare_trainer(max_epochs=1, devices=1, strategy=strategy)
        try:
            with patch.dict(os.environ):  # Lightning names ranks there, which others would inherit
                trainer.fit(editor, EditDataModule(requests=tiny_requests(3), batch_size=2))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        edits.append(editor.committed())
    assert same_edit(*edits)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "tp"])
def test_the_command_line_starts_the_second_process(
    world: TinyWorld, tmp_path: Path, way: str
) -> None:
    ran = world.run(tmp_path / "run", "-c", f"trainer/{way}")
    assert ran.returncode == 0, ran.stderr
    assert "Starting with 2 processes" in ran.stderr
    assert metrics_of(tmp_path / "run")["reliability/teacher_forced"]["n"] == 5
