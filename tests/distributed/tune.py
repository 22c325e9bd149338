# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Tunes the tiny model by each method on two processes; each writes the changes it committed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import Tensor

import lightning_edit
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, trained_tiny_model

__all__ = ["SETTINGS", "tune", "tune_and_save"]

SETTINGS: dict[str, dict[str, Any]] = {
    "LocFT": {"lr": 5e-3},
    "FullTuning": {"lr": 1e-3},
    "LoRATuning": {"lr": 1e-2},
}


def tune(method: str, processes: int) -> dict[str, Tensor]:
    """Three epochs of five requests in batches of four and one, of which one process has no row.

    Returns:
        The committed change of each weight, and the last loss that was logged.
    """
    model, tokenizer = trained_tiny_model()
    editor = getattr(lightning_edit, method).from_model(model, tokenizer, **SETTINGS[method])
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=3,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(editor, datamodule=EditDataModule(requests=tiny_requests(5), batch_size=4))
    delta = editor.committed()
    changes = {name: delta.dense(name).contiguous() for name in delta.changes}
    return {**changes, "loss": trainer.callback_metrics["loss"]}


def tune_and_save(folder: Path) -> None:
    """Tunes by each method as one of two processes, and saves what this one has."""
    for name in SETTINGS:
        save_file(tune(name, processes=2), folder / f"{name}-{os.environ['RANK']}")
