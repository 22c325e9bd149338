# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Trains editors under a strategy; each process writes the networks that it has in the end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import Tensor

import lightning_edit
from lightning_edit import EditMemory, EditModule
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.sharding import whole_tensor
from lightning_edit.data import EditDataModule, HeldOut
from lightning_edit.demos import tiny_requests, trained_tiny_model
from tests.contract.enumeration import LEARNERS, quick
from tests.distributed.editing import WAYS, strategy_of

__all__ = ["CASES", "learn"]

#: Name of a case: method and arguments.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mend": ("MEND", {"rank": 4, "edit_lr": 0.01, "edit_lr_lr": 1e-3}),
    "mend_together": ("MEND", {"rank": 4, "edit_lr": 0.01, "edits_at_once": None}),
    "malmen": ("MALMEN", {"rank": 4, "edit_lr": 0.01, "micro_batch_size": 2}),
    "malmen_apart": ("MALMEN", {"rank": 4, "edit_lr": 0.01, "edits_at_once": 2}),
    "rledit": ("RLEdit", {"rank": 4, "edit_lr": 0.01, "micro_batch_size": 2, "sequence": 2}),
    "ke": ("KE", {"layers": [3], "hidden": 8, "condition": 16, "warmup_steps": 0}),
    "serac": ("SERAC", {"width": 16, "rank": 2, "cross_negatives": True}),
}
# Whoever adds one gets its cases.
CASES |= {
    name: (name, quick(cls))
    for name, cls in LEARNERS.items()
    if name not in {method for method, _ in CASES.values()}
}


def trainer_of(way: str, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=math.prod(WAYS[way]),
        strategy=strategy_of(way),
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
    figures = {f"figures.{name}": t.clone() for name, t in trainer.callback_metrics.items()}
    return {**tensors, **figures}


def learn(case: str, folder: Path, way: str, alone: Path) -> None:
    """Learns, edits, takes the edit out, and goes on from checkpoints of both.

    Two epochs of seven requests in batches of three: under `ddp` one process has no share of the
    last one.

    Args:
        case: Name of a case.
        folder: Gets, for each process, a file of what it has in the end of the case.
        way: The strategy.
        alone: The folder of one process, whose checkpoints lie there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    editor, data = fresh(case)
    trainer = trainer_of(way, max_epochs=2)
    trainer.fit(editor, data)
    found = learned(editor, trainer)
    edit = editor.edit(tiny_requests(1))
    before = weight_hash(editor.model)
    edit.apply_(editor.model)
    found |= {f"edited.{name}": tensor for name, tensor in written(editor).items()}
    edit.revert_(editor.model)
    assert weight_hash(editor.model) == before
    editor, data = fresh(case)
    halfway = trainer_of(way, max_epochs=1)
    halfway.fit(editor, data)
    halfway.save_checkpoint(folder / f"{case}.ckpt")
    for source, place in (("own", folder), ("one", alone)):
        editor, data = fresh(case)
        again = trainer_of(way, max_epochs=2)
        again.fit(editor, data, ckpt_path=place / f"{case}.ckpt")
        found |= {f"from_{source}.{k}": t for k, t in learned(editor, again).items()}
    kept = {name: tensor.contiguous().clone() for name, tensor in found.items()}
    save_file(kept, folder / f"{case}-{trainer.global_rank}.safetensors")


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
