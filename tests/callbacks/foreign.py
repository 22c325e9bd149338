# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A LightningModule as somebody else would write it, and runs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_edit.core.batch import EditBatch, PromptTokenizer
from lightning_edit.core.request import EditRequest
from lightning_edit.data import EditDataModule, OldThenNew
from lightning_edit.demos import tiny_requests, trained_tiny_model

__all__ = ["Foreign", "data_of", "fit", "foreign", "quiet_trainer", "weights_of"]


class Foreign(LightningModule):
    """Trains a language model by Lightning's own loop."""

    def __init__(self, net: Any, tokenizer: Any, lr: float = 1e-3) -> None:
        super().__init__()
        self.net = net.train()
        self.tokenizer = tokenizer
        self.lr = lr
        self.losses: list[float] = []

    def loss(self, batch: list[EditRequest]) -> Tensor:
        tokens = EditBatch.from_requests(batch, PromptTokenizer(self.tokenizer))
        loss: Tensor = self.net(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, labels=tokens.labels
        ).loss
        return loss

    def training_step(self, batch: list[EditRequest], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)


def foreign(lr: float = 1e-3) -> Foreign:
    """A fresh one around the trained tiny model."""
    return Foreign(*trained_tiny_model(), lr=lr)


def data_of(old: bool = False, n: int = 4) -> EditDataModule:
    """New answers of the tiny world, or the old ones, in batches of two."""
    data = EditDataModule(requests=tiny_requests(n), batch_size=2)
    return EditDataModule(requests=data.old_requests, batch_size=2) if old else data


def quiet_trainer(*callbacks: Callback, max_epochs: int = 1, **settings: Any) -> Trainer:
    """A Trainer that says and writes nothing by itself."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(max_epochs=max_epochs, callbacks=list(callbacks), **{**defaults, **settings})


def fit(
    module: Foreign,
    data: EditDataModule | OldThenNew,
    *callbacks: Callback,
    max_epochs: int = 1,
    ckpt_path: str | Path | None = None,
    **settings: Any,
) -> Foreign:
    """Fits and returns the module."""
    if isinstance(data, OldThenNew):
        settings = {"reload_dataloaders_every_n_epochs": 1, **settings}
    trainer = quiet_trainer(*callbacks, max_epochs=max_epochs, **settings)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return module


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}
