# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits a tiny model whose weights two processes have in parts; each writes what it has."""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import save_file

import lightning_edit
from lightning_edit import EditCheckpoint, EditEvaluator, EditModule, EditReport
from lightning_edit.core.sharding import whole_tensor
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests
from tests.distributed.edit import CASES, TOKENS, written

__all__ = ["PATIENCE", "edit", "edit_all"]

#: Seconds after which processes that do not meet give up.
PATIENCE = 60


def trainer_of(folder: Path, processes: int, *callbacks: Callback, **settings: Any) -> Trainer:
    parallel = ModelParallelStrategy(
        data_parallel_size=processes, tensor_parallel_size=1, timeout=timedelta(seconds=PATIENCE)
    )
    return Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=parallel if processes > 1 else "auto",
        callbacks=[*callbacks, EditCheckpoint(), EditReport()],
        default_root_dir=folder,
        inference_mode=False,
        limit_val_batches=settings.pop("limit_val_batches", 0),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fresh(case: str, model: Path, folder: Path) -> tuple[EditModule[Any], EditDataModule]:
    method, settings, batch_size = CASES[case]
    seed_everything(0, verbose=False)
    editor = getattr(lightning_edit, method)(
        model=str(model), cache_dir=str(folder / "cache"), max_new_tokens=TOKENS, **settings
    )
    data = EditDataModule(requests=tiny_requests(5), batch_size=batch_size, eval_batch_size=2)
    return editor, data


def edit(case: str, model: Path, folder: Path, processes: int) -> dict[str, Any]:
    """Edits with five requests, and measures.

    Args:
        case: Name of a case.
        model: Folder of a model and its tokenizer.
        folder: Where the run goes; weights of each process lie there afterwards.
        processes: Number of processes; the weights of one are whole.

    Returns:
        What this process knows in the end, as JSON types.
    """
    editor, data = fresh(case, model, folder)
    evaluator = EditEvaluator(every_n_steps=2, max_new_tokens=TOKENS)
    trainer = trainer_of(folder, processes, evaluator, max_epochs=1)
    trainer.fit(editor, data)
    kept = {f"written/{n}": t.contiguous() for n, t in written(editor).items()}
    kept |= {
        name: whole_tensor(p).detach().clone()
        for name, p in editor.model.named_parameters()
        if name in editor.target.originals
    }
    save_file(kept, folder / f"kept-{trainer.global_rank}.safetensors")
    measuring = trainer_of(folder, processes, limit_val_batches=1.0)
    measuring.validate(editor, data, verbose=False)
    validated = {k: float(v) for k, v in measuring.callback_metrics.items()}
    measuring.test(editor, data, verbose=False)
    tested = {k: float(v) for k, v in measuring.callback_metrics.items()}
    texts = measuring.predict(editor, data)
    return {
        "steps": trainer.global_step,
        "base": editor.base.sha256,
        "history": [row["id"] for row in editor.history],
        "rows": {key: [row.before, row.after, row.n] for key, row in evaluator.rows.items()},
        "sequence": evaluator.sequence,
        "validated": validated,
        "tested": tested,
        "texts": [row for batch in texts or [] for row in batch],
    }


def edit_all(cases: Sequence[str], model: Path, folder: Path) -> None:
    """Edits in all cases as one of two processes, and writes down what this one knows."""
    for case in cases:
        try:
            result = edit(case, model, folder / case, processes=2)
        except Exception:
            print(case, traceback.format_exc(), flush=True)
            raise
        rank = torch.distributed.get_rank()
        (folder / f"{case}-{rank}.json").write_text(json.dumps(result))
