# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Cases under strategies: one group of processes does all cases of one, so that it starts once."""

from __future__ import annotations

import faulthandler
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.processes import GroupError, run_group

__all__ = ["CLOSE", "HANGS", "asked_in", "distance", "run_cases"]

#: How far the weights of several processes may be from those of one, relative to them.
CLOSE = {"ddp": 1e-6, "FSDP2": 1e-6, "TP": 5e-3, "FSDP2+TP": 5e-3}
#: Seconds after which a process says where it stands in a case, and ends.
HANGS = 300


def run_cases(
    count: int, job: Callable[..., object], cases: Sequence[str], folder: Path, *arguments: object
) -> dict[str, str]:
    """Has processes do a job in all cases. After one that fails another group does those left.

    A case in which native code crashes is run once more, with a warning: torch 2.13 has done so
    inside of its autograd engine, in one of a hundred trainings on divided weights or fewer.

    Args:
        count: Number of processes.
        job: A function of a module; gets the name of a case, the folder and the arguments. What it
            leaves in a folder of the case's name is removed before it does the case again.
        cases: Names of cases.
        folder: Where the job writes; gets files that tell which cases are done.

    Returns:
        What the processes said, by case that failed.
    """
    failed, crashed, left = {}, set[str](), list(cases)
    while left:
        try:
            run_group(count, _do, job, left, folder, arguments)
            break
        except AssertionError as error:
            undone = [
                not all(_mark(folder, case, rank).exists() for rank in range(count))
                for case in left
            ]
            if True not in undone:
                raise  # they failed on their way out
            first = undone.index(True)
            case = left[first]
            left = left[first + 1 :]
            if isinstance(error, GroupError) and error.crashed and case not in crashed:
                warnings.warn(f"{case} crashed and is run once more:\n{error}", stacklevel=2)
                shutil.rmtree(folder / case, ignore_errors=True)
                crashed.add(case)
                left.insert(0, case)
            else:
                failed[case] = str(error)
    return failed


def asked_in(request: pytest.FixtureRequest) -> list[tuple[str, str]]:
    """Pairs of `way` and `case` of the tests of a file that run now, each once."""
    specs = [
        item.callspec
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.path == request.path
        and hasattr(item, "callspec")
    ]
    found = [spec.params for spec in specs if "case" in spec.params]
    return list(dict.fromkeys((str(one["way"]), str(one["case"])) for one in found))


def distance(one: Path, other: Path) -> float:
    """Largest relative distance of the tensors of two files."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max((float((a[n] - b[n]).norm() / a[n].norm().clamp_min(1e-30)) for n in a), default=0)


def _mark(folder: Path, case: str, rank: int) -> Path:
    return folder / f"{case}-{rank}.done"


def _do(
    job: Callable[..., object], cases: Sequence[str], folder: Path, arguments: Sequence[object]
) -> None:
    """What each process does."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        faulthandler.dump_traceback_later(HANGS, exit=True)
        job(case, folder, *arguments)
        faulthandler.cancel_dump_traceback_later()
        _mark(folder, case, int(os.environ["RANK"])).touch()
