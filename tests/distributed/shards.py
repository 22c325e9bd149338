# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What two processes do with parts of weights, and what becomes of those that differ or end."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import lightning_edit
from lightning_edit.core import sharding
from lightning_edit.core.batch import EditBatch
from lightning_edit.core.errors import EditError, ModelError
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, tiny_tokenizer
from tests import zoo
from tests.distributed.editing import WAYS, fresh, keep, strategy_of, trainer_of
from tests.modules.helpers import bare_trainer

__all__ = ["LARGE", "count_gathers", "edit_kind", "edit_large", "leave", "tamper"]

#: Cases that are tried with weights that are gathered a matrix at a time.
LARGE = ("rome_batches", "memit", "fine_tune", "grace")


def tamper(model: Path, folder: Path) -> None:
    """Edits by DDP as one of two processes, of which the second makes another second edit."""
    case = "rome_one_by_one"
    editor, data = fresh(case, model, folder)
    rank, usual = int(os.environ["RANK"]), editor.compute_edit

    def compute(batch: EditBatch) -> Any:
        edit = usual(batch)
        return edit * 1.001 if rank and editor.history else edit

    editor.compute_edit = compute  # type: ignore[method-assign]
    trainer = bare_trainer(devices=2, strategy="ddp", max_epochs=1)
    try:
        trainer.fit(editor, data)
    except EditError as error:
        (folder / f"{rank}.txt").write_text(f"{len(editor.history)}: {error}")


def leave(model: Path, folder: Path) -> None:
    """Edits divided weights as one of two processes, whose second ends in its second edit."""
    case = "rome_one_by_one"
    editor, data = fresh(case, model, folder)
    rank, usual = int(os.environ["RANK"]), editor.compute_edit

    def compute(batch: EditBatch) -> Any:
        if rank and editor.history:
            os._exit(0)
        return usual(batch)

    editor.compute_edit = compute  # type: ignore[method-assign]
    began = time.monotonic()
    try:
        trainer_of(folder, "FSDP2", max_epochs=1).fit(editor, data)
    except EditError as error:
        seconds = time.monotonic() - began
        (folder / "said.json").write_text(json.dumps([len(editor.history), seconds, str(error)]))
        os._exit(0)  # a process group of which one is gone cannot be taken down


def edit_kind(kind: str, folder: Path, way: str, models: Path) -> None:
    """Edits a model of some kind by ROME, and writes what comes of it.

    One process is given it in memory, and saves it for others to load.

    Args:
        kind: A name in ``zoo.DECODERS``.
        folder: Gets the edited weights, or the reason why the model is not divided.
        way: The strategy.
        models: Where models are saved.
    """
    seed_everything(0, verbose=False)
    settings: dict[str, Any] = {
        "steps": 3,
        "tokens_per_dimension": 1,
        "layers": [0],
        "context_templates": ["{}", "Yes. {}"],
    }
    if way == "one":
        model = zoo.build(kind)
        model.save_pretrained(models / kind)
        tiny_tokenizer().save_pretrained(models / kind)
        editor = lightning_edit.ROME.from_model(model, tiny_tokenizer(), **settings)
    else:
        editor = lightning_edit.ROME(model=str(models / kind), **settings)
    devices, strategy = math.prod(WAYS[way]), strategy_of(way)
    trainer = bare_trainer(devices=devices, strategy=strategy, max_epochs=1)
    try:
        trainer.fit(editor, EditDataModule(requests=tiny_requests(2), batch_size=2))
    except ModelError as error:
        (folder / f"{kind}.txt").write_text(str(error))
        return
    keep(editor, folder / f"{kind}-{trainer.global_rank}.safetensors")


def edit_large(model: Path, folder: Path, way: str = "FSDP2") -> None:
    """Edits weights that are gathered a matrix at a time, as large ones are, and writes them."""
    with patch.object(sharding, "_LARGE", 1):
        for case in LARGE:
            editor: Any
            editor, data = fresh(case, model, folder / case)
            trainer = trainer_of(folder / case, way, max_epochs=1)
            trainer.fit(editor, data)
            keep(editor, folder / f"{case}-{trainer.global_rank}.safetensors")
            if case == "memit":  # of which each keeps a share, that all gather
                kept = editor.moments._moments[1]._rows.clone()
                found = {"share": kept, "whole": editor.second_moment(1)}
                save_file(found, folder / f"moment-{trainer.global_rank}.safetensors")


class CountGathers(Callback):
    """Counts how often a whole tensor is gathered in each step."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self._now = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        usual = DTensor.full_tensor
        _ = pl_module.base  # hashed once, tensor by tensor

        def gather(tensor: DTensor, **settings: Any) -> Tensor:
            self._now += 1
            return usual(tensor, **settings)

        DTensor.full_tensor = gather  # type: ignore[assignment,method-assign]

    def on_train_batch_start(self, *_: object) -> None:
        self._now = 0

    def on_train_batch_end(self, *_: object) -> None:
        self.counts.append(self._now)


def count_gathers(model: Path, folder: Path) -> None:
    """Edits divided weights, and writes how many whole tensors each step has gathered."""
    found = {}
    for case in ("rome_batches", "memit", "fine_tune"):
        editor, data = fresh(case, model, folder / case)
        counting = CountGathers()
        bare_trainer(
            devices=2, strategy=strategy_of("FSDP2"), max_epochs=1, callbacks=[counting]
        ).fit(editor, data)
        found[case] = counting.counts
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
