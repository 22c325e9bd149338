# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Which instruction sets the tests are run on, by what the CPU has."""

from __future__ import annotations

import subprocess
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests import processors


@pytest.mark.parametrize(
    ("own", "ran", "lacking"),
    [
        ("avx512", ["default", "avx2"], []),
        ("avx2", ["default"], ["avx512"]),
        ("default", [], ["avx2", "avx512"]),
        ("sve256", ["default"], ["avx2", "avx512"]),
    ],
)
def test_sets_below_that_of_the_cpu_are_run(
    own: str,
    ran: list[str],
    lacking: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs: list[tuple[list[str], str]] = []

    def run(words: list[str], *, env: dict[str, str], check: bool) -> CompletedProcess[Any]:
        runs.append((words[-3:], env["ATEN_CPU_CAPABILITY"]))
        return CompletedProcess(words, returncode=int(env["ATEN_CPU_CAPABILITY"] == "avx2"))

    monkeypatch.setattr(processors, "own_set", lambda: own)
    monkeypatch.setattr(subprocess, "run", run)
    assert processors.main(["-m", "not slow"]) == ("avx2" in ran)
    assert runs == [(["pytest", "-m", "not slow"], name) for name in ran]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(processors.ORDER) + 1
    left_out = [line.split(":")[0] for line in lines if "lacks it" in line]
    assert left_out == [f"== {name}" for name in lacking]
    assert lines[-1] == f"== red: {'avx2' if 'avx2' in ran else 'none'}"
