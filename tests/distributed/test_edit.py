# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editing on two processes gives the weights and the metrics of one."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from lightning_edit import GRACE, SCR, EditModule, MemoryWrite, WeightDelta
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests
from tests.contract.enumeration import RememberingEditor, quick_editor
from tests.distributed.edit import CASES, edit, edit_and_tell
from tests.modules.helpers import bare_trainer, same_edit
from tests.processes import run_pair
from tests.runs import TinyWorld, metrics_of

# ROME on a tiny model shares directions among its few keys, which it says.
pytestmark = pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning")

# These share out their work as others do, of whom `make test` asks it.
ALIKE = ("r_rome", "emmet", "pmet", "scr")
PARAMETERS = [
    pytest.param(case, marks=[pytest.mark.slow] if case in ALIKE else []) for case in CASES
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def two(world: TinyWorld) -> Callable[[str], Path]:
    """Folder of what two processes did in a case."""
    folder = world.folder / "two"

    @functools.cache
    def folder_of(case: str) -> Path:
        run_pair(edit_and_tell, case, world.model, folder)
        return folder

    return folder_of


def results_of(folder: Path, case: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", PARAMETERS)
def test_two_processes_do_what_one_does(
    world: TinyWorld, two: Callable[[str], Path], case: str
) -> None:
    first, second = results_of(two(case), case)
    assert first == second  # hashes of the weights, metrics, everything
    alone = world.folder / "one" / case
    one = edit(case, world.model, alone, processes=1)
    batch_size = CASES[case][2]
    assert first["steps"] == one["steps"] == -(-5 // batch_size)
    assert first["history"] == one["history"]
    # A resumed run ends with the very bits of one that was not interrupted.
    assert first["resumed"] == first["weights"]
    shared, whole = (
        load_file(folder / "delta-0.safetensors") for folder in (two(case) / case, alone)
    )
    for name, change in whole.items():
        if batch_size == 1:
            assert torch.equal(shared[name], change)
        error = torch.linalg.vector_norm(shared[name] - change)
        assert error <= 1e-4 * torch.linalg.vector_norm(change)
    assert first["rows"].keys() == one["rows"].keys()
    for key, (before, after, n) in one["rows"].items():
        assert first["rows"][key] == [
            pytest.approx(before, abs=1e-5),
            pytest.approx(after, rel=1e-3, abs=1e-5),
            n,
        ], key
    if one["removed"] is not None:
        # The same bits on both processes, as was said above; of the same requests as on one.
        ids = [request.id for request in tiny_requests(5)]
        for found in (first["removed"], one["removed"]):
            assert found["of"] == [ids[1]]
            assert found["history"] == [ids[0], *ids[2:]]
            assert found["weights"] != first["weights"]
        if batch_size == 1:
            assert first["removed"] == one["removed"]
    for verb in ("validated", "tested"):
        assert first[verb] == pytest.approx(one[verb], abs=1e-6), verb
    assert [p["edits"] for p in first["sequence"]] == [p["edits"] for p in one["sequence"]]


@pytest.mark.parametrize("case", PARAMETERS)
def test_the_first_process_writes_one_report_of_all_requests(
    two: Callable[[str], Path], case: str
) -> None:
    folder = two(case) / case
    metrics = metrics_of(folder)
    assert metrics["reliability/teacher_forced"]["n"] == 5
    assert metrics["generality/autoregressive"]["n"] == 10
    assert len((folder / "edits.jsonl").read_text().splitlines()) == 5
    remembers = case in ("grace", "t_patcher", "wise", "ike", "scr")
    kind = MemoryWrite if remembers else WeightDelta
    assert len(kind.load(folder / "delta").provenance.request_ids) == 5


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
def test_the_command_line_starts_the_second_process(world: TinyWorld, tmp_path: Path) -> None:
    ran = world.run(tmp_path / "run", "-c", "trainer/ddp")
    assert ran.returncode == 0, ran.stderr
    assert "Starting with 2 processes" in ran.stderr
    assert metrics_of(tmp_path / "run")["reliability/teacher_forced"]["n"] == 5
