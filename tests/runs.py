# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Runs of the command line over a tiny model that lies in a folder."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_edit.__main__ import main
from lightning_edit.core.delta import WeightDelta
from lightning_edit.demos import tiny_requests, trained_tiny_model
from tests.processes import LONG

__all__ = [
    "NOISE",
    "ROOT",
    "TinyWorld",
    "assert_same_edit",
    "metrics_of",
    "printed_command",
    "run_here",
]

ROOT = Path(__file__).parent.parent
#: What a run of the program does not say.
NOISE = ("Traceback", "litlogger", "eval mode", "LeafSpec", "workers")


class TinyWorld:
    """A folder with a model, requests and a configuration of a run that edits it in a second.

    Args:
        folder: An empty folder.
        n: Number of requests.
        model: A model to save in place of the trained tiny one.
        method: The class to edit with.
        settings: Its arguments.
    """

    def __init__(
        self,
        folder: Path,
        n: int = 5,
        model: Any = None,
        method: str = "ROME",
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.requests = folder / "requests.jsonl"
        self.config = folder / "run.yaml"
        trained, tokenizer = trained_tiny_model()
        (model or trained).save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        lines = [json.dumps(request.to_dict()) for request in tiny_requests(n)]
        self.requests.write_text("\n".join(lines))
        if settings is None:
            settings = {
                "layers": [0],
                "steps": 6,
                "tokens_per_dimension": 1,
                "context_templates": ["{}", "Yes. {}"],
            }
        arguments = {**settings, "model": str(self.model), "cache_dir": str(folder / "cache")}
        config = {
            "model": {"class_path": method, "init_args": arguments},
            "data": {"class_path": "EditDataModule", "init_args": {"path": str(self.requests)}},
        }
        self.config.write_text(yaml.safe_dump(config))

    def arguments(self, run: Path, *more: str, verb: str = "fit") -> list[str]:
        """Words of a command line that leaves its results in a folder."""
        return [
            verb,
            "-c",
            str(ROOT / "configs" / "trainer" / "default.yaml"),
            "-c",
            str(self.config),
            "--trainer.accelerator=cpu",
            f"--trainer.default_root_dir={run}",
            *more,
        ]

    def run(self, run: Path, *more: str, verb: str = "fit") -> subprocess.CompletedProcess[str]:
        """Runs the program as a user does, with as many threads as this process has."""
        return subprocess.run(
            [sys.executable, "-m", "lightning_edit", *self.arguments(run, *more, verb=verb)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            capture_output=True,
            text=True,
            timeout=LONG,
            check=False,
        )


def run_here(words: Sequence[str]) -> int:
    """Runs a command line in this process.

    Returns:
        The exit status.
    """
    kept = sys.argv[:]
    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv[:] = kept


def printed_command(text: str) -> tuple[Path, list[str]]:
    """The command that an interrupted run says to go on with: its folder and its words."""
    [line] = [line for line in text.splitlines() if "Go on with: cd " in line]
    cd, folder, and_then, program, *words = shlex.split(line.partition("Go on with: ")[2])
    assert (cd, and_then, program) == ("cd", "&&", "lightning-edit")
    return Path(folder), words


def metrics_of(run: Path) -> dict[str, Any]:
    """The metrics in a run's folder."""
    metrics: dict[str, Any] = json.loads((run / "results.json").read_text())["metrics"]
    return metrics


def assert_same_edit(one: Path, other: Path) -> None:
    """Checks that two runs have left the same weights, bit for bit, and the same provenance."""
    a, b = (WeightDelta.load(run / "delta") for run in (one, other))
    assert a.hashes, "an edit without hashes proves nothing"
    assert a.hashes == b.hashes  # of the original and the edited tensors
    assert a.provenance == b.provenance
    assert list(a.changes) == list(b.changes)
    for name in a.changes:
        assert torch.equal(a.dense(name), b.dense(name)), name
    assert metrics_of(one) == metrics_of(other)
