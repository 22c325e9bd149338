# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Forgetting before learning on one process, or on two with whole or with half weights.

The folder has a task vector in ``vector``; weights and task vectors are written beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from lightning_edit import OldThenNew, SaveTaskVector, TaskVectorForgetting
from lightning_edit.core.sharding import whole_tensor
from lightning_edit.demos import trained_tiny_model
from tests.callbacks.foreign import Foreign, data_of, quiet_trainer

__all__ = ["run", "run_and_save"]


class Sharded(Foreign):
    """Holds its share of every weight."""

    def configure_model(self) -> None:
        if self.device_mesh is not None and not hasattr(self.net, "set_reshard_after_forward"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def run(folder: Path, processes: int, strategy: str = "auto") -> dict[str, Tensor]:
    """Weights after each way of forgetting, gathered."""
    found: dict[str, Tensor] = {}

    def fit(name: str, data: Any, *callbacks: Callback, resume: Path | None = None) -> None:
        sharded = strategy == "sharded"
        module = (Sharded if sharded else Foreign)(*trained_tiny_model())
        parallel = ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1)
        settings: dict[str, Any] = {
            "devices": processes,
            "limit_val_batches": 0,
            "strategy": parallel if sharded else strategy,
        }
        trainer = quiet_trainer(
            *callbacks,
            max_epochs=3,
            reload_dataloaders_every_n_epochs=1,
            enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
            **settings,
        )
        trainer.fit(module, data, ckpt_path=resume)
        for key, parameter in module.net.named_parameters():
            found[f"{name}/{key}"] = whole_tensor(parameter).detach().clone()

    fit("saved", data_of(), TaskVectorForgetting(str(folder / "vector"), rate=0.7))

    def phases() -> list[Any]:
        vector = str(folder / f"learned-{processes}")
        return [
            OldThenNew(data_of(), 1, old=data_of(old=True)),
            TaskVectorForgetting(rate=0.7, forget_epochs=1, save_task_vector=vector),
        ]

    checkpoints = folder / f"checkpoints-{processes}"
    keep = ModelCheckpoint(checkpoints, "{step}", save_top_k=-1, every_n_train_steps=1)
    fit("phases", *phases(), keep)
    for step in (1, 2, 3):
        fit(f"resumed-{step}", *phases(), resume=checkpoints / f"step={step}.ckpt")
    whole = SaveTaskVector(str(folder / f"whole-{processes}"))
    fit("whole", data_of(old=True), whole)
    return found


def run_and_save(folder: Path, strategy: str) -> None:
    """Forgets as one of two processes, by ``ddp`` or ``sharded``, and saves what this one has."""
    weights = run(folder, 2, strategy)
    save_file(weights, folder / f"weights-{torch.distributed.get_rank()}")
