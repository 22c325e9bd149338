# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Trains editors on two processes; each writes the networks that it has in the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import Tensor

import lightning_edit
from lightning_edit.data import EditDataModule, HeldOut
from lightning_edit.demos import tiny_requests, trained_tiny_model

__all__ = ["CASES", "learn", "learn_and_save"]

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


def learn(case: str, processes: int) -> dict[str, Tensor]:
    """Two epochs of seven requests in batches of three, of whose last one process has no share.

    Returns:
        The tensors of the network, and the last figures that were logged.
    """
    method, settings = CASES[case]
    model, tokenizer = trained_tiny_model()
    editor = getattr(lightning_edit, method).from_model(model, tokenizer, **settings)
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=2,
        check_val_every_n_epoch=2,
        accumulate_grad_batches=2,
        gradient_clip_val=10.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    requests = tiny_requests(10)
    trainer.fit(
        editor,
        HeldOut(
            EditDataModule(requests=requests[:7], batch_size=3),
            EditDataModule(requests=requests[7:], eval_batch_size=2),
        ),
    )
    tensors = {f"network.{name}": t.clone() for name, t in editor.network.state_dict().items()}
    figures = {name: t.clone() for name, t in trainer.callback_metrics.items()}
    return {**tensors, **figures}


def learn_and_save(case: str, folder: Path) -> None:
    """Learns as one of two processes, and saves what this one has."""
    save_file(learn(case, processes=2), folder / f"{case}-{os.environ['RANK']}")
