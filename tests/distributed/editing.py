# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits a tiny model under a strategy, by every verb; each process writes what it has."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import save_file
from torch import Tensor

import lightning_edit
from lightning_edit import EditCheckpoint, EditEvaluator, EditMemory, EditModule, EditReport
from lightning_edit.core.hashing import tensor_hash, weight_hash
from lightning_edit.core.sharding import whole_tensor
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests
from tests.contract.enumeration import EDITORS, quick

__all__ = [
    "CASES",
    "PATIENCE",
    "REMOVING",
    "TRAINED",
    "WAYS",
    "edit",
    "edit_as_one_of_a_group",
    "fresh",
    "go_on",
    "interrupt",
    "is_measured",
    "keep",
    "strategy_of",
    "strategy_without_processes",
    "trainer_of",
]

#: Seconds after which processes that do not meet give up.
PATIENCE = 60
#: Strategies, with the sizes of both kinds of groups; ``one`` process is compared with.
WAYS = {"one": (1, 1), "ddp": (2, 1), "FSDP2": (2, 1), "TP": (1, 2), "FSDP2+TP": (2, 2)}
#: Name of a case: editor, its arguments, requests in a batch, epochs.
CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "rome_one_by_one": ("ROME", {"layers": [0], "steps": 4, "tokens_per_dimension": 1}, 1, 1),
    # Under `ddp` one process has no share of the last batch.
    "rome_batches": ("ROME", {"layers": [0], "steps": 4, "tokens_per_dimension": 1}, 2, 1),
    "r_rome": ("RROME", {"layers": [0], "steps": 4, "tokens_per_dimension": 1}, 2, 1),
    "emmet": ("EMMET", {"layers": [0], "steps": 4, "tokens_per_dimension": 1}, 3, 1),
    "memit": ("MEMIT", {"layers": [0, 1], "steps": 4, "tokens_per_dimension": 1}, 3, 1),
    "pmet": ("PMET", {"layers": [0, 1], "steps": 4, "tokens_per_dimension": 1}, 3, 1),
    "alpha_edit": ("AlphaEdit", {"layers": [0, 1], "steps": 4, "tokens_per_dimension": 1}, 2, 1),
    "ultra_edit": ("UltraEdit", {"layers": [2], "lr": 1e-3}, 3, 1),
    "kn": ("KN", {"steps": 4}, 2, 1),
    "fine_tune": ("FineTune", {"layers": [2], "steps": 3}, 2, 1),
    "fine_tune_all": ("FineTune", {"parameters": "all", "steps": 2}, 2, 1),
    "lora": ("LoRA", {"layers": [1], "rank": 2, "steps": 3}, 2, 1),
    "grace": ("GRACE", {"layers": [1], "steps": 3}, 2, 1),
    "t_patcher": ("TPatcher", {"steps": 8, "first_check": 8, "memory_tokens": 64}, 2, 1),
    "wise": ("WISE", {"layers": [2], "steps": 3, "copy_size": 2, "replay": True}, 3, 1),
    "ike": ("IKE", {"count": 2}, 2, 1),
    "scr": ("SCR", {}, 2, 1),
    "trained_editor": ("TrainedEditor", {}, 2, 1),
    "loc_ft": ("LocFT", {"lr": 5e-3}, 4, 3),
    "full_tuning": ("FullTuning", {"lr": 1e-3}, 4, 3),
    "lora_tuning": ("LoRATuning", {"layers": [1, 2], "rank": 2, "lr": 1e-2}, 4, 3),
}
# Whoever adds an editor gets its cases.
CASES |= {
    name: (name, {k: v for k, v in quick(cls).items() if k != "max_new_tokens"}, 2, 1)
    for name, cls in EDITORS.items()
    if name not in {method for method, *_ in CASES.values()}
}
#: The file beside the model of what `trained_editor` edits by.
TRAINED = "mend.ckpt"
# Those by which every verb is tried on divided weights.
THOROUGH = ("rome_batches", "fine_tune", "grace")
# Those that requests are taken out of again: weights, several a batch, and a memory.
REMOVING = ("rome_one_by_one", "memit", "grace", "wise")
# Of a continuation: enough for an answer, and for its end.
TOKENS = 6


def strategy_of(way: str) -> Any:
    """What a Trainer takes as its strategy."""
    if way == "one":
        return "auto"
    patience = timedelta(seconds=PATIENCE)
    if way == "ddp":
        return DDPStrategy(timeout=patience)
    return ModelParallelStrategy(*WAYS[way], timeout=patience)


def strategy_without_processes(data: int, tensor: int) -> Any:
    """A strategy whose groups have these sizes, without its processes."""

    class Group:
        def __init__(self, size: int) -> None:
            self._size = size

        def size(self) -> int:
            return self._size

    strategy = ModelParallelStrategy(data, tensor)
    mesh: Any = {"data_parallel": Group(data), "tensor_parallel": Group(tensor)}
    strategy._device_mesh = mesh
    return strategy


def trainer_of(folder: Path, way: str, *callbacks: Callback, **settings: Any) -> Trainer:
    """A Trainer that writes checkpoints of edits, and nothing on the screen."""
    data, tensor = WAYS[way]
    return Trainer(
        accelerator="cpu",
        devices=data * tensor,
        strategy=strategy_of(way),
        callbacks=[*callbacks, EditCheckpoint()],
        default_root_dir=folder,
        inference_mode=False,
        limit_val_batches=settings.pop("limit_val_batches", 0),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fresh(case: str, model: Path, folder: Path) -> tuple[EditModule[Any], EditDataModule]:
    """An editor of a model in a folder, and five requests."""
    method, settings, batch_size, _ = CASES[case]
    if method == "TrainedEditor":
        settings = {"checkpoint": str(model.parent / TRAINED)}
    seed_everything(0, verbose=False)
    editor = getattr(lightning_edit, method)(
        model=str(model), cache_dir=str(folder / "cache"), max_new_tokens=TOKENS, **settings
    )
    data = EditDataModule(requests=tiny_requests(5), batch_size=batch_size, eval_batch_size=2)
    return editor, data


def remembered(editor: EditModule[Any]) -> dict[str, Tensor]:
    """What a memory holds, by name; nothing where the edits are of weights."""
    memory = EditMemory.find(editor.model)
    return {
        f"{name}.{field}": tensor.clone()
        for name, entry in (memory.entries if memory is not None else {}).items()
        for field, tensor in entry.tensors.items()
    }


def keep(editor: EditModule[Any], file: Path) -> list[str]:
    """Writes the edited weights, gathered, and what a memory holds.

    Returns:
        Hashes of all of that.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {
        name: whole_tensor(p).detach().clone().contiguous()
        for name, p in editor.target.parameters.items()
    }
    kept |= remembered(editor)
    save_file(kept, file)
    return [tensor_hash(kept[name]) for name in sorted(kept)]


def is_measured(way: str, case: str) -> bool:
    """Whether figures are compared in a case: four processes take long to measure."""
    return "+" not in way or case in THOROUGH


def evaluators_of(case: str) -> list[EditEvaluator]:
    """What measures an interrupted run and the one that goes on from it, in thorough cases."""
    return [EditEvaluator(max_new_tokens=TOKENS)] if case in THOROUGH else []


def rows_of(evaluator: EditEvaluator) -> dict[str, Any]:
    """Figures of all requests before and after, and how many they are of."""
    return {key: [row.before, row.after, row.n] for key, row in evaluator.rows.items()}


def edit(case: str, model: Path, folder: Path, way: str) -> dict[str, Any]:
    """Edits with five requests, measures, and takes the edits out.

    Args:
        case: Name of a case.
        model: Folder of a model and its tokenizer.
        folder: Where the run goes; weights of each process lie there afterwards.
        way: The strategy.

    Returns:
        What this process knows in the end, as JSON types.
    """
    editor, data = fresh(case, model, folder)
    evaluator = EditEvaluator(every_n_steps=2, max_new_tokens=TOKENS)
    callbacks: list[Callback] = [*([evaluator] if is_measured(way, case) else []), EditReport()]
    trainer = trainer_of(folder, way, *callbacks, max_epochs=CASES[case][3])
    trainer.fit(editor, data)
    rank = trainer.global_rank
    kept = keep(editor, folder / f"kept-{rank}.safetensors")
    measuring = trainer_of(folder, way, EditReport(), limit_val_batches=1.0)
    validated: dict[str, float] = {}
    tested: dict[str, float] = {}
    texts: list[Any] = []
    # On divided weights, which make every pass slow, only the evaluator measures in most cases.
    if case in THOROUGH or way in ("one", "ddp"):
        measuring.validate(editor, data, verbose=False)
        validated = {k: float(v) for k, v in measuring.callback_metrics.items()}
    if case in THOROUGH:
        measuring.test(editor, data, verbose=False)
        tested = {k: float(v) for k, v in measuring.callback_metrics.items()}
        texts = measuring.predict(editor, data) or []
    elif way in ("one", "ddp"):
        measuring.test(fresh(case, model, folder)[0], data, verbose=False)
        tested = {k: float(v) for k, v in measuring.callback_metrics.items()}
    found = {
        "steps": trainer.global_step,
        "kept": kept,
        "base": editor.base.sha256,
        "history": [row["id"] for row in editor.history],
        "rows": rows_of(evaluator),
        "sequence": evaluator.sequence,
        "validated": validated,
        "tested": tested,
        "texts": [row for batch in texts for row in batch],
    }
    if case in REMOVING:
        taken = editor.remove([editor.history[1]["id"]])
        found["removed"] = {
            "history": [row["id"] for row in editor.history],
            "of": list(taken.provenance.request_ids),
            "kept": keep(editor, folder / "removed" / f"kept-{rank}.safetensors"),
        }
    committed = editor.committed()
    committed.revert_(editor.model)
    reverted = weight_hash(editor.model)
    committed.apply_(editor.model)
    committed.revert_(editor.model)
    left = len(remembered(editor))
    return {**found, "reverted": [reverted, weight_hash(editor.model)], "left": left}


def interrupt(case: str, model: Path, folder: Path, way: str) -> None:
    """Edits until the second step, whose checkpoint is ``step-2.ckpt`` then."""
    editor, data = fresh(case, model, folder)
    evaluators = evaluators_of(case)
    trainer = trainer_of(folder, way, *evaluators, max_epochs=CASES[case][3], max_steps=2)
    trainer.fit(editor, data)
    if trainer.is_global_zero:
        shutil.copy(folder / "checkpoints" / "last.ckpt", folder / "step-2.ckpt")
    trainer.strategy.barrier()


def go_on(case: str, model: Path, folder: Path, way: str, checkpoint: Path) -> dict[str, Any]:
    """Goes on from a checkpoint, and writes the weights of each process into the folder."""
    editor, data = fresh(case, model, folder)
    evaluators = evaluators_of(case)
    trainer = trainer_of(folder, way, *evaluators, max_epochs=CASES[case][3])
    trainer.fit(editor, data, ckpt_path=checkpoint)
    return {
        "kept": keep(editor, folder / f"kept-{trainer.global_rank}.safetensors"),
        "history": [row["id"] for row in editor.history],
        "rows": [rows_of(evaluator) for evaluator in evaluators],
    }


def edit_as_one_of_a_group(case: str, folder: Path, way: str, model: Path, alone: Path) -> None:
    """Edits in a case as one of several processes, and writes down what this one knows.

    Args:
        case: Name of a case.
        folder: Gets a folder of the case.
        way: The strategy.
        model: Folder of a model and its tokenizer.
        alone: Has the checkpoint that one process has left in each case.
    """
    own, step = folder / case, Path("interrupted", "step-2.ckpt")
    result = edit(case, model, own, way)
    interrupt(case, model, own / "interrupted", way)
    result["resumed"] = go_on(case, model, own / "resumed", way, own / step)
    result["from_one"] = go_on(case, model, own / "from_one", way, alone / case / step)
    (own / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(result))
