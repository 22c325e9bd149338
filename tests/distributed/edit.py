# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits a tiny model on two processes; each writes what it has in the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import save_file
from torch import Tensor

import lightning_edit
from lightning_edit import EditCheckpoint, EditEvaluator, EditMemory, EditModule, EditReport
from lightning_edit.core.hashing import tensor_hash, weight_hash
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests

__all__ = ["CASES", "edit", "edit_and_tell"]

# Name of a case: editor, its arguments, and requests in a batch.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "rome_one_by_one": ("ROME", {"layers": [0], "steps": 4, "tokens_per_dimension": 1}, 1),
    # Of the last batch one process has no share.
    "rome_batches": ("ROME", {"layers": [0], "steps": 4, "tokens_per_dimension": 1}, 2),
    "r_rome": ("RROME", {"layers": [0], "steps": 4, "tokens_per_dimension": 1}, 2),
    "emmet": ("EMMET", {"layers": [0], "steps": 4, "tokens_per_dimension": 1}, 3),
    "memit": ("MEMIT", {"layers": [0, 1], "steps": 4, "tokens_per_dimension": 1}, 3),
    "pmet": ("PMET", {"layers": [0, 1], "steps": 4, "tokens_per_dimension": 1}, 3),
    "alpha_edit": ("AlphaEdit", {"layers": [0, 1], "steps": 4, "tokens_per_dimension": 1}, 2),
    "ultra_edit": ("UltraEdit", {"layers": [2], "lr": 1e-3}, 3),
    "kn": ("KN", {"steps": 4}, 2),
    "fine_tune": ("FineTune", {"layers": [2], "steps": 3}, 2),
    "lora": ("LoRA", {"layers": [1], "rank": 2, "steps": 3}, 2),
    "grace": ("GRACE", {"layers": [1], "steps": 3}, 2),
    "t_patcher": ("TPatcher", {"steps": 8, "first_check": 8, "memory_tokens": 64}, 2),
    "wise": ("WISE", {"layers": [2], "steps": 3, "copy_size": 2, "replay": True}, 3),
    "ike": ("IKE", {"count": 2}, 2),
    "scr": ("SCR", {}, 2),
}
# Those that requests are taken out of again: weights, several a batch, and a memory.
REMOVING = ("rome", "memit", "grace", "wise")
# Of a continuation: enough for an answer, and for its end.
TOKENS = 6


def trainer_of(folder: Path, processes: int, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        callbacks=[*callbacks, EditCheckpoint(), EditReport()],
        default_root_dir=folder,
        inference_mode=False,
        limit_val_batches=settings.pop("limit_val_batches", 0),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def written(editor: EditModule) -> dict[str, Tensor]:
    """All that the editor has written, by name."""
    memory = EditMemory.find(editor.model)
    if memory is None:
        return {name: editor.delta.dense(name).contiguous() for name in editor.delta.changes}
    return {
        f"{name}.{field}": tensor.clone()
        for name, entry in memory.entries.items()
        for field, tensor in entry.tensors.items()
    }


def fingerprint(editor: EditModule) -> list[str]:
    """Hashes of the weights and of all that was written."""
    return [weight_hash(editor.model), *map(tensor_hash, written(editor).values())]


def removed(editor: EditModule) -> dict[str, Any]:
    """What is left once all processes have taken the second request out together."""
    edit = editor.remove([editor.history[1]["id"]])
    return {
        "weights": fingerprint(editor),
        "history": [row["id"] for row in editor.history],
        "of": list(edit.provenance.request_ids),
    }


def edit(case: str, model: Path, folder: Path, processes: int) -> dict[str, Any]:
    """Edits with five requests, and measures; two processes also go on from the second step.

    That one process ends there as if nothing had happened is for every editor's tests to say.

    Args:
        case: Name of a case.
        model: Folder of a model and its tokenizer.
        folder: Where the run goes; weights of each process lie there afterwards.
        processes: Number of processes.

    Returns:
        What this process knows in the end, as JSON types.
    """
    method, settings, batch_size = CASES[case]

    def fresh() -> tuple[EditModule, EditDataModule]:
        seed_everything(0, verbose=False)
        editor = getattr(lightning_edit, method)(
            model=str(model), cache_dir=str(folder / "cache"), max_new_tokens=TOKENS, **settings
        )
        return editor, EditDataModule(
            requests=tiny_requests(5), batch_size=batch_size, eval_batch_size=2
        )

    def resumed() -> list[str]:
        for settings, checkpoint in (({"max_steps": 2}, None), ({}, "last")):
            editor, data = fresh()
            evaluator = EditEvaluator(max_new_tokens=TOKENS)
            trainer = trainer_of(folder / "resumed", processes, evaluator, max_epochs=1, **settings)
            trainer.fit(editor, data, ckpt_path=checkpoint)
        return fingerprint(editor)

    editor, data = fresh()
    evaluator = EditEvaluator(every_n_steps=2, max_new_tokens=TOKENS)
    trainer = trainer_of(folder, processes, evaluator, max_epochs=1)
    trainer.fit(editor, data)
    edited = fingerprint(editor)
    measuring = trainer_of(folder, processes, limit_val_batches=1.0)
    measuring.validate(editor, data, verbose=False)
    validated = {k: float(v) for k, v in measuring.callback_metrics.items()}
    measuring.test(fresh()[0], data, verbose=False)
    save_file(written(editor), folder / f"delta-{trainer.global_rank}.safetensors")
    return {
        "steps": trainer.global_step,
        "weights": edited,
        "resumed": resumed() if processes > 1 else None,
        "removed": removed(editor) if case in REMOVING else None,
        "history": [row["id"] for row in editor.history],
        "rows": {key: [row.before, row.after, row.n] for key, row in evaluator.rows.items()},
        "sequence": evaluator.sequence,
        "validated": validated,
        "tested": {k: float(v) for k, v in measuring.callback_metrics.items()},
    }


def edit_and_tell(case: str, model: Path, folder: Path) -> None:
    """Edits as one of two processes, and writes down what this one knows."""
    result = edit(case, model, folder / case, processes=2)
    rank = torch.distributed.get_rank()
    (folder / f"{case}-{rank}.json").write_text(json.dumps(result))
