# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Callbacks around a training that knows nothing of editing: what did it do to the facts?

Run ``python examples/foreign_trainer.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_edit import EditEvaluator, EditReport
from lightning_edit.demos import tiny_requests, trained_tiny_model


class PlainFineTuning(LightningModule):
    """Anybody's module: a Hugging Face model, its tokenizer, the usual loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.tokenizer = trained_tiny_model()

    def training_step(self, texts: list[str], batch_idx: int) -> Tensor:
        """Mean loss of the texts' tokens."""
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
        loss: Tensor = self.net(**tokens, labels=labels).loss
        return loss

    def configure_optimizers(self) -> Any:
        """The usual one."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    requests = tiny_requests(6)
    texts = [f"{request.prompt} {request.target_new}." for request in requests]
    trainer = Trainer(
        max_epochs=8,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        # The two lines that are new. They find the model and the tokenizer by their types.
        callbacks=[
            EditEvaluator(requests=requests),
            EditReport(dirpath="runs/foreign_trainer"),
        ],
    )
    trainer.fit(PlainFineTuning(), DataLoader(texts, batch_size=3))  # type: ignore[arg-type]
    print("Open runs/foreign_trainer/report.html to see every answer before and after.")
