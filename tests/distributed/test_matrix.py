# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A group of processes does all cases of a strategy, and outlives those that fail."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.matrix import run_cases


def job(case: str, folder: Path) -> None:
    """Fails or crashes as the case is named; leaves what it did."""
    began = [folder / f"{case}-began-{rank}" for rank in range(2)]
    own = began[int(os.environ["RANK"])]
    again = own.exists()
    own.touch()
    while not all(file.exists() for file in began):  # else the other might be in a case before
        time.sleep(0.01)
    if case == "fails":
        raise ValueError("on purpose")
    if case == "crashes" or (case == "crashes_once" and not again):
        os.kill(os.getpid(), signal.SIGABRT)
    (folder / case).mkdir(exist_ok=True)


@pytest.mark.filterwarnings("ignore:.*is run once more:UserWarning")
def test_cases_after_one_that_fails_are_run_and_one_that_crashes_is_run_once_more(
    tmp_path: Path,
) -> None:
    cases = ["first", "fails", "crashes_once", "crashes", "last"]
    failed = run_cases(2, job, cases, tmp_path)
    assert failed.keys() == {"fails", "crashes"}
    assert "on purpose" in failed["fails"]
    assert all((tmp_path / case).is_dir() for case in ("first", "crashes_once", "last"))


def test_a_crash_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="crashes_once crashed and is run once more"):
        assert not run_cases(2, job, ["crashes_once"], tmp_path)
