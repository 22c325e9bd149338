# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Runs the loaders under DistributedDataParallel on two processes; each writes what it saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torchmetrics import SumMetric

from lightning_edit.core.request import EditRequest
from lightning_edit.data import EditDataModule


class Witness(LightningModule):
    """Writes down every batch, and counts requests over all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.count = SumMetric()
        self.seen: list[list[str]] = []

    def forward(self, batch: list[EditRequest]) -> Tensor:
        self.seen.append([request.id for request in batch])
        output: Tensor = self.linear(torch.ones(1, 1)).sum()
        return output

    def training_step(self, batch: list[EditRequest]) -> Tensor:
        output: Tensor = self(batch)
        return output

    def validation_step(self, batch: list[EditRequest]) -> None:
        self(batch)
        self.count.update(len(batch))
        self.log("count", self.count, batch_size=len(batch))

    def predict_step(self, batch: list[EditRequest]) -> None:
        self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder: Path, verb: str, count: int, **kwargs: Any) -> tuple[Trainer, Witness]:
    """Runs one verb over a number of requests."""
    requests = [EditRequest(f"Person {i} is", f"Person {i}", "x", id=f"p{i}") for i in range(count)]
    checkpoint = ModelCheckpoint(
        folder,
        filename="{step}",
        every_n_train_steps=1,
        save_top_k=-1,
        auto_insert_metric_name=False,
    )
    witness = Witness()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        limit_val_batches=0 if verb == "fit" else 1.0,
        callbacks=[checkpoint],
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )
    getattr(trainer, verb)(
        witness, datamodule=EditDataModule(requests=requests, batch_size=2), **kwargs
    )
    return trainer, witness


def see(folder: Path) -> None:
    """Fits, resumes, validates and predicts."""
    trainer, fitted = run(folder, "fit", 5)
    _, resumed = run(folder, "fit", 5, ckpt_path=folder / "2.ckpt")
    validation, several = run(folder, "validate", 5)
    single_validation, single = run(folder, "validate", 1)
    results = {
        "fit": fitted.seen,
        "resumed": resumed.seen,
        "validate": several.seen,
        "count": int(validation.callback_metrics["count"]),
        "single": single.seen,
        "single_count": int(single_validation.callback_metrics["count"]),
        "predict": run(folder, "predict", 5)[1].seen,
    }
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(results))
