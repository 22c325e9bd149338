# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits a tiny model whose weights two processes have in parts; each writes what it has."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import lightning_edit
from lightning_edit import EditCheckpoint, EditEvaluator, EditMemory, EditModule, EditReport
from lightning_edit.core.batch import EditBatch
from lightning_edit.core.errors import EditError, ModelError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.sharding import whole_tensor
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, tiny_tokenizer
from tests import zoo
from tests.distributed import edit as whole
from tests.modules.helpers import bare_trainer

__all__ = [
    "CASES",
    "PATIENCE",
    "WAYS",
    "count_gathers",
    "edit",
    "edit_all",
    "edit_kinds",
    "go_on",
    "interrupt",
    "leave",
    "tamper",
]

#: Seconds after which processes that do not meet give up.
PATIENCE = 60
# Ways of dividing weights, with the sizes of both kinds of groups.
WAYS = {"one": (1, 1), "FSDP2": (2, 1), "TP": (1, 2), "FSDP2+TP": (2, 2)}
# Name of a case: editor, its arguments, requests in a batch, epochs.
CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    **{name: (*case, 1) for name, case in whole.CASES.items()},
    "fine_tune_all": ("FineTune", {"parameters": "all", "steps": 2}, 2, 1),
    "loc_ft": ("LocFT", {"lr": 5e-3}, 4, 3),
    "full_tuning": ("FullTuning", {"lr": 1e-3}, 4, 3),
    "lora_tuning": ("LoRATuning", {"layers": [1, 2], "rank": 2, "lr": 1e-2}, 4, 3),
}

# Those by which every verb is tried.
QUICKLY: dict[str, Any] = {"layers": [0], "context_templates": ["{}", "Yes. {}"]}
THOROUGH = ("rome_batches", "fine_tune", "grace")


def trainer_of(folder: Path, way: str, case: str, *callbacks: Callback, **settings: Any) -> Trainer:
    data, tensor = WAYS[way]
    parallel = ModelParallelStrategy(data, tensor, timeout=timedelta(seconds=PATIENCE))
    return Trainer(
        accelerator="cpu",
        devices=data * tensor,
        strategy="auto" if way == "one" else parallel,
        callbacks=[*callbacks, EditCheckpoint()],
        default_root_dir=folder,
        max_epochs=CASES[case][3],
        inference_mode=False,
        limit_val_batches=settings.pop("limit_val_batches", 0),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def fresh(case: str, model: Path, folder: Path) -> tuple[EditModule[Any], EditDataModule]:
    method, settings, batch_size, _ = CASES[case]
    seed_everything(0, verbose=False)
    editor = getattr(lightning_edit, method)(
        model=str(model), cache_dir=str(folder / "cache"), max_new_tokens=whole.TOKENS, **settings
    )
    data = EditDataModule(requests=tiny_requests(5), batch_size=batch_size, eval_batch_size=2)
    return editor, data


def keep(editor: EditModule[Any], file: Path) -> None:
    """Writes the edited weights, gathered, or what a memory holds."""
    kept: dict[str, Tensor] = {
        name: whole_tensor(p).detach().clone() for name, p in editor.target.parameters.items()
    }
    if EditMemory.find(editor.model) is not None:
        kept |= whole.written(editor)
    save_file({name: t.contiguous() for name, t in kept.items()}, file)


def edit(case: str, model: Path, folder: Path, way: str) -> dict[str, Any]:
    """Edits with five requests, measures, and takes the edits out.

    Args:
        case: Name of a case.
        model: Folder of a model and its tokenizer.
        folder: Where the run goes; weights of each process lie there afterwards.
        way: How weights are divided; those of ``one`` process are whole.

    Returns:
        What this process knows in the end, as JSON types.
    """
    editor, data = fresh(case, model, folder)
    evaluator = EditEvaluator(every_n_steps=2, max_new_tokens=whole.TOKENS)
    trainer = trainer_of(folder, way, case, evaluator, EditReport())
    trainer.fit(editor, data)
    keep(editor, folder / f"kept-{trainer.global_rank}.safetensors")
    measuring = trainer_of(folder, way, case, EditReport(), limit_val_batches=1.0)
    measuring.validate(editor, data, verbose=False)
    validated = {k: float(v) for k, v in measuring.callback_metrics.items()}
    tested: dict[str, float] = {}
    texts: list[Any] = []
    if case in THOROUGH:
        measuring.test(editor, data, verbose=False)
        tested = {k: float(v) for k, v in measuring.callback_metrics.items()}
        texts = measuring.predict(editor, data) or []
    found = {
        "steps": trainer.global_step,
        "base": editor.base.sha256,
        "history": [row["id"] for row in editor.history],
        "rows": {key: [row.before, row.after, row.n] for key, row in evaluator.rows.items()},
        "sequence": evaluator.sequence,
        "validated": validated,
        "tested": tested,
        "texts": [row for batch in texts for row in batch],
    }
    committed = editor.committed()
    committed.revert_(editor.model)
    reverted = weight_hash(editor.model)
    committed.apply_(editor.model)
    committed.revert_(editor.model)
    return {**found, "reverted": [reverted, weight_hash(editor.model)]}


def interrupt(case: str, model: Path, folder: Path, way: str) -> None:
    """Edits until the second step, whose checkpoint is ``step-2.ckpt`` then."""
    editor, data = fresh(case, model, folder)
    trainer = trainer_of(folder, way, case, max_steps=2)
    trainer.fit(editor, data)
    if trainer.is_global_zero:
        shutil.copy(folder / "checkpoints" / "last.ckpt", folder / "step-2.ckpt")
    trainer.strategy.barrier()


def go_on(case: str, model: Path, folder: Path, way: str, checkpoint: Path) -> list[str]:
    """Goes on from a checkpoint, and writes the weights of each process into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    editor, data = fresh(case, model, folder)
    trainer = trainer_of(folder, way, case)
    trainer.fit(editor, data, ckpt_path=checkpoint)
    keep(editor, folder / f"kept-{trainer.global_rank}.safetensors")
    return [row["id"] for row in editor.history]


def edit_all(cases: Sequence[str], model: Path, folder: Path, way: str) -> None:
    """Edits in all cases as one of two processes, and writes down what this one knows.

    Args:
        cases: Names of cases.
        way: How weights are divided.
        model: Folder of a model and its tokenizer.
        folder: Has ``one`` with the checkpoints that one process has left in each case.
    """
    for case in cases:
        print(f"Case {case}", flush=True)
        own = folder / way / case
        result = edit(case, model, own, way)
        interrupt(case, model, own / "interrupted", way)
        step = own / "interrupted" / "step-2.ckpt"
        alone = folder / "one" / case / "interrupted" / "step-2.ckpt"
        result["resumed"] = go_on(case, model, own / "resumed", way, step)
        result["from_one"] = go_on(case, model, own / "from_one", way, alone)
        (own / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(result))


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
        trainer_of(folder, "FSDP2", case).fit(editor, data)
    except EditError as error:
        seconds = time.monotonic() - began
        (folder / "said.json").write_text(json.dumps([len(editor.history), seconds, str(error)]))
        os._exit(0)  # a process group of which one is gone cannot be taken down


def edit_kinds(folder: Path, way: str) -> None:
    """Edits models of all kinds by ROME, and writes what comes of it.

    One process is given them in memory, and saves them for others to load.
    """
    models, folder = folder / "models", folder / way
    folder.mkdir(parents=True, exist_ok=True)
    for kind in zoo.DECODERS:
        seed_everything(0, verbose=False)
        settings = {"steps": 3, "tokens_per_dimension": 1, **QUICKLY}
        if way == "one":
            model = zoo.build(kind)
            model.save_pretrained(models / kind)
            tiny_tokenizer().save_pretrained(models / kind)
            editor = lightning_edit.ROME.from_model(model, tiny_tokenizer(), **settings)
        else:
            editor = lightning_edit.ROME(model=str(models / kind), **settings)
        data, tensor = WAYS[way]
        strategy: Any = "auto" if way == "one" else ModelParallelStrategy(data, tensor)
        trainer = bare_trainer(devices=data * tensor, strategy=strategy, max_epochs=1)
        try:
            trainer.fit(editor, EditDataModule(requests=tiny_requests(2), batch_size=2))
        except ModelError as error:
            (folder / f"{kind}.txt").write_text(str(error))
            continue
        keep(editor, folder / f"{kind}-{trainer.global_rank}.safetensors")


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
            devices=2, strategy=ModelParallelStrategy(2, 1), max_epochs=1, callbacks=[counting]
        ).fit(editor, data)
        found[case] = counting.counts
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
