# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Trains editors on two processes; each writes the networks that it has in the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import save_file
from torch import Tensor

import lightning_edit
from lightning_edit import EditMemory, EditModule
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.sharding import whole_tensor
from lightning_edit.data import EditDataModule, HeldOut
from lightning_edit.demos import tiny_requests, trained_tiny_model

__all__ = ["CASES", "learn", "learn_and_save", "learn_in_parts"]

# Name of a case: method and arguments.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mend": ("MEND", {"rank": 4, "edit_lr": 0.01, "edit_lr_lr": 1e-3}),
    "mend_together": ("MEND", {"rank": 4, "edit_lr": 0.01, "edits_at_once": None}),
    "malmen": ("MALMEN", {"rank": 4, "edit_lr": 0.01, "micro_batch_size": 2}),
    "malmen_apart": ("MALMEN", {"rank": 4, "edit_lr": 0.01, "edits_at_once": 2}),
    "rledit": ("RLEdit", {"rank": 4, "edit_lr": 0.01, "micro_batch_size": 2, "sequence": 2}),
    "ke": ("KE", {"layers": [3], "hidden": 8, "condition": 16, "warmup_steps": 0}),
    "serac": ("SERAC", {"width": 16, "rank": 2, "cross_negatives": True}),
}


def trainer_of(processes: int, way: str = "ddp", **settings: Any) -> Trainer:
    strategy: Any = "auto"
    if processes > 1:
        strategy = way if way == "ddp" else ModelParallelStrategy(processes, 1)
    return Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        check_val_every_n_epoch=2,
        accumulate_grad_batches=2,
        gradient_clip_val=10.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fresh(case: str) -> tuple[EditModule[Any], HeldOut]:
    method, settings = CASES[case]
    model, tokenizer = trained_tiny_model()
    editor = getattr(lightning_edit, method).from_model(model, tokenizer, **settings)
    requests = tiny_requests(10)
    data = HeldOut(
        EditDataModule(requests=requests[:7], batch_size=3),
        EditDataModule(requests=requests[7:], eval_batch_size=2),
    )
    return editor, data


def learned(editor: Any, trainer: Trainer) -> dict[str, Tensor]:
    """The tensors of the network, and the last figures that were logged."""
    tensors = {f"network.{name}": t.clone() for name, t in editor.network.state_dict().items()}
    figures = {name: t.clone() for name, t in trainer.callback_metrics.items()}
    return {**tensors, **figures}


def learn(case: str, processes: int, way: str = "ddp") -> dict[str, Tensor]:
    """Two epochs of seven requests in batches of three, of whose last one process has no share.

    Returns:
        The tensors of the network, and the last figures that were logged.
    """
    editor, data = fresh(case)
    trainer = trainer_of(processes, way, max_epochs=2)
    trainer.fit(editor, data)
    return learned(editor, trainer)


def learn_and_save(case: str, folder: Path) -> None:
    """Learns as one of two processes, and saves what this one has."""
    save_file(learn(case, processes=2), folder / f"{case}-{os.environ['RANK']}")


def learn_in_parts(cases: Sequence[str], folder: Path, processes: int) -> None:
    """Learns beside weights that processes have in parts, edits, and goes on from checkpoints.

    Args:
        cases: Names of cases.
        folder: Gets, for each process, a file of what it has in the end of each case. Two processes
            find checkpoints there that one process has left.
        processes: Number of processes.
    """
    rank = os.environ.get("RANK", "0")
    for case in cases:
        print(f"Case {case}", flush=True)
        editor, data = fresh(case)
        trainer = trainer_of(processes, "parts", max_epochs=2)
        trainer.fit(editor, data)
        found = learned(editor, trainer)
        edit = editor.edit(tiny_requests(1))
        before = weight_hash(editor.model)
        edit.apply_(editor.model)
        found |= {f"edited.{name}": tensor for name, tensor in written(editor).items()}
        edit.revert_(editor.model)
        assert weight_hash(editor.model) == before
        editor, data = fresh(case)
        halfway = trainer_of(processes, "parts", max_epochs=1)
        halfway.fit(editor, data)
        halfway.save_checkpoint(folder / f"{case}-{processes}.ckpt")
        for count in (1, processes):
            editor, data = fresh(case)
            trainer = trainer_of(processes, "parts", max_epochs=2)
            trainer.fit(editor, data, ckpt_path=folder / f"{case}-{count}.ckpt")
            found |= {f"from_{count}.{k}": t for k, t in learned(editor, trainer).items()}
        kept = {name: tensor.contiguous().clone() for name, tensor in found.items()}
        save_file(kept, folder / f"{case}-{processes}-{rank}")


def written(editor: EditModule[Any]) -> dict[str, Tensor]:
    """The weights that are edited, gathered, or what a memory holds."""
    memory = EditMemory.find(editor.model)
    if memory is None:
        return {name: whole_tensor(p).clone() for name, p in editor.target.parameters.items()}
    return {
        f"{name}.{field}": tensor
        for name, entry in memory.entries.items()
        for field, tensor in entry.tensors.items()
    }
