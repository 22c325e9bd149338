# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Estimates second moments on two processes; each writes what it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.processes import Processes
from lightning_edit.demos import tiny_tokenizer
from lightning_edit.modules.locate_then_edit.second_moment import second_moments
from tests import zoo


def estimate(folder: Path, text: str | None) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = zoo.build("llama")
    tokens = PromptTokenizer(tiny_tokenizer())
    passes: list[int] = []
    ran = ModelTree.of(model).blocks[2]
    # Each token that is sampled is a pass, too, but of one position.
    ran.register_forward_pre_hook(
        lambda _, args: passes.append(1) if args[0].shape[1] == 64 else None
    )
    cache = folder / f"cache{rank}"

    def run() -> dict[Any, Any]:
        return dict(
            second_moments(
                ModelTree.of(model),
                tokens,
                [0, 2],
                model_hash="abc",
                text=text,
                tokens_per_dimension=100,
                cache_dir=cache,
                processes=Processes.running(),
            )
        )

    found = run()
    found["passes"] = len(passes)
    if rank:  # one process loses what it had
        for file in cache.rglob("*.safetensors"):
            file.unlink()
    passes.clear()
    again = run()
    assert all(torch.equal(again[layer], found[layer]) for layer in again)
    found["again"] = len(passes)
    torch.save(found, folder / f"{rank}.pt")
