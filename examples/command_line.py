# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The command line from end to end: edit, look at what lies there, read the report again.

Run ``python examples/command_line.py`` (a tiny model, seconds), or with ``--model smollm2`` (the
default model, minutes).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from lightning_edit.__main__ import main
from lightning_edit.data import write_requests
from lightning_edit.demos import tiny_requests, trained_tiny_model

RUN = "runs/command_line"


def tiny_settings(folder: Path) -> list[str]:
    """A model of four layers that knows a world of 24 facts, and two facts to change."""
    model, tokenizer = trained_tiny_model()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_requests(tiny_requests(2), folder / "edits.yaml")
    return [
        f"--model.model={folder / 'model'}",
        "--model.layers=[0]",
        "--model.weight_decay=0",
        f"--model.cache_dir={folder}",
        "--data=EditDataModule",
        f"--data.path={folder / 'edits.yaml'}",
    ]


def run(*words: str) -> None:
    print(f"\n$ lightning-edit {' '.join(words)}\n", flush=True)
    if main(words):
        raise SystemExit(f"`lightning-edit {words[0]}` failed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="`tiny`, `smollm2`, a folder or a hub id")
    name = parser.parse_args().model
    with tempfile.TemporaryDirectory() as folder:
        settings = tiny_settings(Path(folder)) if name == "tiny" else [f"--model.model={name}"]
        run("fit", "--config", "edit.yaml", *settings, f"--trainer.default_root_dir={RUN}")
        run("list", RUN)
        run("report", RUN, "--format", "csv")
