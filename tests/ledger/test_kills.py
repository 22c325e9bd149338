# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at any point goes on to the same weights, ledger and report.

Kills by signal come between two of the things that a run does: passes backward, changes of the
model, files that are moved or put on disk, statements of the database. Kills by the size of files
come in the middle of a write, which then is torn: of a checkpoint, a saved edit, the database, or
the report.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_edit import (
    EditCheckpoint,
    EditDataModule,
    EditEvaluator,
    EditLedger,
    EditReport,
    Ledger,
    LoRATuning,
    OldThenNew,
    TaskVectorForgetting,
)
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.edit import Edit
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.demos import tiny_requests
from lightning_edit.ledger.fingerprints import fingerprint
from lightning_edit.optim import EditOptimizer
from tests.contract.enumeration import EDITORS, quick_editor
from tests.modules.helpers import bare_trainer
from tests.processes import run_process

pytest.importorskip("sqlalchemy")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")

METHODS = ("ROME", "MEMIT", "AlphaEdit", "GRACE", "LoRA", "F-Learning")
#: What is another in each run, of the same edits, too.
BOUND_TO_A_RUN = ("seconds", "created", "peak_memory_bytes")
#: Kills of a method in the slow suite: 102 of all six.
SLOW = 17


# -- a run -----------------------------------------------------------------------------------


def run_once(name: str, run: Path) -> str:
    """A run with a ledger, checkpoints and a report, which goes on from where it was killed.

    Returns:
        The fingerprint of the model that it leaves.
    """
    data: Any = EditDataModule(requests=tiny_requests(3))
    more: list[Any] = []
    settings: dict[str, Any] = {"max_epochs": 1}
    if name == "F-Learning":
        editor: Any = quick_editor(LoRATuning)
        data = OldThenNew(data, 1)
        more = [TaskVectorForgetting(forget_epochs=1, rate=0.1, old_nll_warning=None)]
        settings = {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}
    else:
        editor = quick_editor(EDITORS[name], **cached(name, run.parent))
    trainer = bare_trainer(
        callbacks=[
            EditCheckpoint(str(run)),
            *more,
            EditEvaluator(),
            EditLedger(str(run / "ledger.db")),
            EditReport(str(run)),
        ],
        enable_checkpointing=True,
        **settings,
    )
    last = run / "last.ckpt"
    ckpt = last if last.exists() else None
    trainer.fit(editor, data, ckpt_path=ckpt, weights_only=True)
    return fingerprint(editor.model)


def cached(name: str, folder: Path) -> dict[str, Any]:
    """Where second moments lie, which runs of one method share."""
    return {"cache_dir": str(folder / "cache")} if name in ("ROME", "MEMIT", "AlphaEdit") else {}


def left_by(run: Path) -> dict[str, Any]:
    """What a run has left on the disk, but for times; all of it is to be whole."""
    ledger = Ledger(run / "ledger.db")
    entries = ledger.entries()
    assert ledger.verify() == []
    names = {path.name for path in ledger.deltas.folder.iterdir()}
    assert names == {entry.delta for entry in entries}
    results = json.loads((run / "results.json").read_text())
    edits = [json.loads(line) for line in (run / "edits.jsonl").read_text().splitlines()]
    unfinished = [p.name for p in run.rglob("*") if p.name.endswith(".part") or ".new-" in p.name]
    assert unfinished == []
    return {
        "ledger": [(e.id, e.kind, e.requests, e.before, e.after, e.scores) for e in entries],
        "edit": content(Edit.load(run / "delta")),
        "files": sorted(str(p.relative_to(run)) for p in run.glob("[!.]*")),
        "results": timeless(results),
        "edits": timeless(edits),
    }


def content(edit: Edit) -> Any:
    """What is compared of a saved edit."""
    if isinstance(edit, MemoryWrite):
        return [
            (name, entry.requests, {key: value.tolist() for key, value in entry.tensors.items()})
            for name, entry in edit.entries.items()
            if entry is not None
        ]
    assert isinstance(edit, WeightDelta)
    return {name: edit.dense(name).tolist() for name in edit.changes}, edit.provenance


def timeless(value: Any) -> Any:
    """Results without what is another in each run."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in BOUND_TO_A_RUN}
    return [timeless(one) for one in value] if isinstance(value, list) else value


# -- kills -----------------------------------------------------------------------------------


def arm(place: int) -> Callable[[], int]:
    """Has this process kill itself at the so-manieth of the places where a run does something."""
    from sqlalchemy import Engine, event

    passed = 0

    def tick(*_: Any) -> None:
        nonlocal passed
        passed += 1
        if passed == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def ticking(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tick()
            result = function(*args, **kwargs)
            tick()
            return result

        return call

    for name in ("replace", "rename", "fsync", "mkdir", "rmdir", "unlink"):
        setattr(os, name, ticking(getattr(os, name)))
    for name in ("backward", "grad"):
        setattr(torch.autograd, name, ticking(getattr(torch.autograd, name)))
    EditOptimizer.take_over = ticking(EditOptimizer.take_over)  # type: ignore[method-assign]
    for name in ("begin", "commit", "before_cursor_execute"):
        event.listen(Engine, name, tick)
    return lambda: passed


def process(name: str, run: str, place: int, size: int, told: str) -> None:
    """A run in a process of its own, which may be killed at a place, or by the size of a file."""
    import resource

    torch.set_num_threads(1)
    passed = arm(place)
    if size:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    state = run_once(name, Path(run))
    if told:
        Path(told).write_text(json.dumps([passed(), state]))


def forked(*arguments: Any) -> int:
    child = multiprocessing.get_context("fork").Process(target=process, args=arguments)
    child.start()
    child.join()
    return int(child.exitcode or 0)


def kill_and_resume(folder: str, name: str, kills: int, seed: int) -> None:
    """Kills runs, each at a place of its own, and compares what comes of them in the end."""
    rng = random.Random(seed)  # noqa: S311
    place_of = Path(folder)
    whole, told = place_of / "whole", place_of / "told.json"
    assert forked(name, str(whole), 0, 0, str(told)) == 0
    passed, state = json.loads(told.read_text())
    wanted = left_by(whole)
    sizes = [path.stat().st_size for path in sorted(whole.rglob("*")) if path.is_file()]
    for i in range(kills):
        run = place_of / f"{i}"
        if i % 3 == 1:  # a third of them tear a file
            size = rng.randint(1, rng.choice([size for size in sizes if size > 1]) - 1)
            place, how = 0, -signal.SIGXFSZ
        else:
            size, place, how = 0, rng.randint(1, passed), -signal.SIGKILL
        at = f"{name}, kill {i}: place {place} of {passed}, file size {size}"
        assert forked(name, str(run), place, size, "") == how, at
        assert forked(name, str(run), 0, 0, str(told)) == 0, at
        found = left_by(run)
        for part, value in wanted.items():
            assert found[part] == value, (at, part)
        assert json.loads(told.read_text())[1] == state, at
        print(at, flush=True)


@pytest.mark.parametrize("kills", [2, pytest.param(SLOW, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same(
    name: str, kills: int, tmp_path: Path
) -> None:
    done = run_process(kill_and_resume, str(tmp_path), name, kills, kills)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= kills
