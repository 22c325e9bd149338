# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Processes of their own that start warm, alone or several of one group.

A server imports the libraries once for all tests of a pytest process, and a process is forked off
it for each call. Where processes cannot be forked safely, each imports for itself.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

__all__ = [
    "LONG",
    "GroupError",
    "end_server",
    "program",
    "run_group",
    "run_module",
    "run_pair",
    "run_process",
    "run_program",
]

#: Seconds after which a process is taken to hang.
LONG = 1800
# How native code ends a process: by itself Python does not.
_CRASHES = (-signal.SIGABRT, -signal.SIGSEGV)


class GroupError(AssertionError):
    """A process of a group has failed.

    Attributes:
        crashed: Whether native code ended one of them, by a signal.
    """

    def __init__(self, said: str, codes: Sequence[int]) -> None:
        """Takes what the processes said, and their exit codes."""
        super().__init__(said)
        self.crashed = any(code in _CRASHES for code in codes)


if sys.platform == "linux":
    CONTEXT = multiprocessing.get_context("forkserver")
    CONTEXT.set_forkserver_preload(
        [
            "pytest",
            "lightning_edit.cli.trainer",
            "lightning_edit.data",
            "lightning_edit.demos",
            "lightning_edit.modules",
            "torch.distributed.fsdp",
            "transformers.models.llama.modeling_llama",
        ]
    )
else:
    CONTEXT = multiprocessing.get_context("spawn")


def end_server() -> None:
    """Ends the server, where there is one, and waits for it: its time is then that of the tests."""
    if sys.platform == "linux":
        from multiprocessing import forkserver

        forkserver._forkserver._stop()  # type: ignore[attr-defined]


def run_process(target: Callable[..., object], *arguments: object) -> CompletedProcess[str]:
    """Calls a function of a module in a process of its own.

    Raises:
        AssertionError: If the process does not end.
    """
    [finished] = _run(target, arguments, [{}], threads=torch.get_num_threads())
    return finished


def program(words: Sequence[str]) -> None:
    """The command line, for one of these processes to be."""
    from lightning_edit.__main__ import main

    sys.exit(main(words))


def run_program(words: Sequence[str]) -> CompletedProcess[str]:
    """Runs a command line in a process of its own."""
    return run_process(program, list(words))


def run_module(folder: Path, *words: str) -> CompletedProcess[str]:
    """Runs a Python module in a folder as ``python -m`` does, with the packages of that folder."""
    return run_process(_module, str(folder), words)


def _module(folder: str, words: Sequence[str]) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("lightning_edit", "tests"):
            del sys.modules[name]
    gc.collect()  # else classes of the same names would be found twice
    os.chdir(folder)
    os.environ["PYTHONPATH"] = folder
    sys.path.insert(0, folder)
    sys.argv[:] = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def run_pair(target: Callable[..., object], *arguments: object) -> list[CompletedProcess[str]]:
    """Calls a function in two processes of one group; see ``run_group``."""
    return run_group(2, target, *arguments)


def run_group(
    count: int, target: Callable[..., object], *arguments: object
) -> list[CompletedProcess[str]]:
    """Calls a function in some processes, which find around them what ``torchrun`` leaves there.

    Each knows its rank by the variable ``RANK``; a Trainer with so many devices takes them as its
    own.

    Raises:
        GroupError: If one of them fails, with what they said.
        AssertionError: If none ends.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    finished = _run(target, arguments, ranks, threads=1)
    codes = [one.returncode for one in finished]
    if any(codes):
        said = "\n".join(f"rank {rank}:\n{one.stderr}" for rank, one in enumerate(finished))
        raise GroupError(said, codes)
    return finished


def _run(
    target: Callable[..., object],
    arguments: Sequence[object],
    environments: Sequence[dict[str, str]],
    threads: int,
) -> list[CompletedProcess[str]]:
    """Runs a process for each environment."""
    with ExitStack() as stack:
        logs = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in environments]
        processes = [
            CONTEXT.Process(target=_begin, args=(log, environment, threads, target, *arguments))
            for log, environment in zip(logs, environments, strict=True)
        ]
        for process in processes:
            process.start()
            stack.callback(process.close)
        ends = _wait(processes)
        finished = [
            CompletedProcess(target.__name__, process.exitcode or 0, *map(_text, _streams(log)))
            for process, log in zip(processes, logs, strict=True)
        ]
    assert ends, f"No process has ended in {LONG} seconds:\n{finished}"
    return finished


def _wait(processes: Sequence[BaseProcess]) -> bool:
    """Waits until all have ended, and ends the others when one fails or all take too long.

    Returns:
        Whether they came to an end by themselves.
    """
    alive = list(processes)
    while alive:
        ended = wait([process.sentinel for process in alive], LONG)
        alive = [process for process in alive if process.exitcode is None]
        if not ended or any(process.exitcode for process in processes):
            for process in alive:
                process.kill()
                process.join()
            return bool(ended)
    return True


def _streams(log: Path) -> list[Path]:
    """Files of what a process prints, and of what it says besides."""
    return [log / "stdout", log / "stderr"]


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _begin(
    log: Path,
    environment: dict[str, str],
    threads: int,
    target: Callable[..., object],
    *arguments: Any,
) -> None:
    """What a process does first: its output goes to files, its variables are set."""
    for number, file in enumerate(_streams(log), 1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    faulthandler.enable()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    target(*arguments)
