# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What only some systems have is used where it is known to be there."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import torch

import lightning_edit
from lightning_edit import WeightDelta
from lightning_edit.benchmark.store import CellRecord, ResultsFolder
from lightning_edit.core import files
from lightning_edit.core.tensor_files import read_sealed, write_sealed

PACKAGE = Path(lightning_edit.__file__).parent
# Modules and names that Windows lacks.
MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
NAMES = {
    "os": {"fchmod", "fork", "forkpty", "getpgid", "getppgid", "geteuid", "getuid", "killpg"}
    | {"mkfifo", "nice", "O_DIRECTORY", "O_NOFOLLOW", "O_SYNC", "posix_fallocate", "pread"}
    | {"preadv", "pwrite", "pwritev", "sched_getaffinity", "setsid", "statvfs", "sync", "uname"}
    | {"wait", "waitpid"},
    "signal": {"SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "alarm"}
    | {"setitimer", "pause"},
}
MAPS = Path("/proc/self/maps")


def test_nothing_that_windows_lacks_is_taken_for_granted() -> None:
    found: list[str] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # Within a function a module may be missing: its caller says what happens then.
        top = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            match node:
                case ast.Import(names=names) if id(node) in top:
                    found += [f"{path}: {one.name}" for one in names if one.name in MODULES]
                case ast.Attribute(value=ast.Name(id=owner), attr=name):
                    if name in NAMES.get(owner, ()):
                        found.append(f"{path}:{node.lineno}: {owner}.{name}")
    assert not found


def test_results_are_added_without_what_windows_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES["os"]:
        monkeypatch.delattr(os, name, raising=False)
    folder = ResultsFolder(tmp_path)
    folder.add(CellRecord(key="a", status="failed", error="x"), [])
    (tmp_path / folder.CELLS).open("a").close()
    folder.add(CellRecord(key="b", status="failed", error="x"), [])
    assert (tmp_path / folder.CELLS).read_bytes().count(b"\n") == 2
    assert list(folder.records()) == ["a", "b"]


@pytest.mark.skipif(not MAPS.exists(), reason="this system does not tell what is mapped")
@pytest.mark.parametrize("locks", [True, False])
def test_files_are_not_mapped_where_that_would_lock_them(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOCKS_OPEN_FILES", locks)
    value = torch.arange(4096.0)
    WeightDelta({"weight": value}).save(tmp_path / "delta")
    write_sealed(tmp_path / "sealed.safetensors", {"x": value}, {})
    delta = WeightDelta.load(tmp_path / "delta")
    sealed, _ = read_sealed(tmp_path / "sealed.safetensors")
    assert (str(tmp_path) not in MAPS.read_text(encoding="utf-8")) is locks
    assert torch.equal(delta.dense("weight"), value)
    assert torch.equal(sealed["x"], value)
