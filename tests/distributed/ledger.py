# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits a tiny model with a ledger, on as many processes as are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lightning_edit import ROME, EditLedger, EditReport
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, trained_tiny_model
from tests.distributed.editing import trainer_of

__all__ = ["record"]


def record(folder: Path, processes: int = 2) -> None:
    """Four requests in batches of two, the last of which asks for what the second does."""
    requests = tiny_requests(3)
    again = replace(requests[1], prompt=f"{requests[1].prompt} ", id="again")
    editor = ROME.from_model(
        *trained_tiny_model(), layers=[0], steps=4, tokens_per_dimension=1, cache_dir=str(folder)
    )
    recorder = EditLedger(str(folder / "ledger.db"), on_conflict="skip")
    way = "ddp" if processes > 1 else "one"
    trainer = trainer_of(folder, way, recorder, EditReport(), max_epochs=1)
    trainer.fit(editor, EditDataModule(requests=[*requests, again], batch_size=2))
