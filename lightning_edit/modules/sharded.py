# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors whose model Lightning's ``ModelParallelStrategy`` divides among processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from torch import Tensor
from torch.optim import Optimizer

from lightning_edit.checkpoints import load_plainly
from lightning_edit.core.errors import EditError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest
from lightning_edit.core.sharding import is_sharded, shard_
from lightning_edit.passes.borrowing import borrowed

if TYPE_CHECKING:
    from lightning_edit.modules.base import EditModule

__all__ = ["asked_of_all", "counts", "prepare_strategy", "restore_edits", "shard_model"]


def prepare_strategy(trainer: Trainer, editor: EditModule[Any]) -> None:
    """Has the strategy of a Trainer read and write checkpoints as editors do.

    Args:
        trainer: The Trainer that is about to run.
        editor: The editor that it runs.

    Raises:
        EditError: If the editor does not know how the strategy keeps the weights.
    """
    load_plainly(trainer.strategy)
    _check_strategy(trainer, editor)
    if isinstance(trainer.strategy, ModelParallelStrategy):
        _save_in_one_file(trainer.strategy, editor)


def _check_strategy(trainer: Trainer, editor: EditModule[Any]) -> None:
    name, strategy = type(editor).__name__, trainer.strategy
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise EditError(
            f"{type(strategy).__name__} keeps flat copies of the weights, in which {name} cannot "
            "edit one matrix. Where a model does not fit on one device, set `trainer.strategy` to "
            "`ModelParallelStrategy`; else to `ddp`."
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if not editor.edits_shards:
        raise EditError(
            f"{name} does not work on weights that are divided among processes. Set "
            "`trainer.strategy` to `ddp`, by which each process has all of them, or choose an "
            "editor that does: ROME, MEMIT, FineTune or GRACE, for example."
        )
    if strategy.device_mesh["tensor_parallel"].size() > 1:
        raise EditError(
            f"`tensor_parallel_size` is {strategy.device_mesh['tensor_parallel'].size()}, but "
            f"{name} works on whole projections, which each process has in turn. Set "
            f"`data_parallel_size={trainer.world_size}` and `tensor_parallel_size=1`."
        )


def shard_model(editor: EditModule[Any]) -> None:
    """Has each process keep its part of an editor's model, if the Trainer's strategy divides it.

    Raises:
        EditError: If edits are committed already, which whole weights were kept of.
    """
    mesh = editor.device_mesh
    if mesh is None or is_sharded(editor.model):
        return
    if len(editor.delta):
        raise EditError(
            f"{type(editor).__name__} has committed edits to a whole model, which "
            "`ModelParallelStrategy` would divide. Commit them under it from the beginning, or go "
            "on from a checkpoint (`ckpt_path`)."
        )
    tree = ModelTree.of(editor.model)
    blocks = [*tree.blocks]
    if tree.is_encoder_decoder:
        encoder = ModelTree.of(editor.model, "encoder")
        blocks += [] if encoder.block_names == tree.block_names else encoder.blocks
    with borrowed(editor.model):
        shard_(editor.model, blocks, mesh["data_parallel"])
    editor.adopt(editor.model, editor.tokens.tokenizer)  # what is kept of it is divided, too


def asked_of_all(editor: EditModule[Any], batch: list[EditRequest]) -> list[EditRequest]:
    """The requests that every process has to run: those of all, where a pass takes all processes.

    Args:
        editor: The editor.
        batch: This process's share.
    """
    if not is_sharded(editor.model):
        return batch
    return [request for part in Processes.running().objects(batch) for request in part]


def counts(editor: EditModule[Any]) -> bool:
    """Whether what this process has measured is counted: by one process, where all measure it."""
    return not is_sharded(editor.model) or Processes.running().rank == 0


class _OneFile:
    """In the place of a sharded strategy's own ways: one file, of any number of processes.

    Args:
        strategy: The strategy.
        editor: The editor that it runs.
    """

    def __init__(self, strategy: ModelParallelStrategy, editor: EditModule[Any]) -> None:
        self.strategy = strategy
        self.editor = editor

    def module_state(self) -> dict[str, Tensor]:
        """The editor's state without weights that the edits tell."""
        state: Mapping[str, Tensor] = self.editor.state_dict()
        return {n: t for n, t in state.items() if not hasattr(t, "full_tensor")}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of the optimizer itself."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return cast(Optimizer, inner).state_dict()

    def save(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None
    ) -> None:
        """Writes the file, by the first process."""
        Strategy.save_checkpoint(self.strategy, checkpoint, filepath, storage_options)

    def load_model(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads what the file holds of the editor but weights, which the edits have written."""
        own = self.module_state()
        state = {n: t for n, t in checkpoint["state_dict"].items() if n in own}
        Strategy.load_model_state_dict(self.strategy, {"state_dict": state}, strict)


def restore_edits(editor: EditModule[Any], checkpoint: Mapping[str, Any]) -> None:
    """Takes over the edits in a checkpoint, and writes them where it lacks the edited weights.

    Args:
        editor: The editor.
        checkpoint: Of this editor, whatever strategy wrote it.
    """
    # The other verbs, for which Lightning restores no optimizer, have to know the edits, too.
    edits = checkpoint["lightning_edit"].get("edits", {})
    for state in (*checkpoint.get("optimizer_states", ()), edits):
        if "delta" in state:
            editor.edit_optimizer.load_state_dict(state)
            weights = {f"model.{name}" for name in editor.target.originals}
            if not weights <= checkpoint["state_dict"].keys():
                editor.edit_optimizer.rewind(editor.delta)


def _save_in_one_file(strategy: ModelParallelStrategy, editor: EditModule[Any]) -> None:
    """Has checkpoints of a sharded editor be those of one process.

    They hold edits, what is carried from one to the next and what a memory remembers, which are
    the same on every process. Edited weights follow from the base and the edits.
    """
    own, patched = _OneFile(strategy, editor), cast(Any, strategy)
    patched.lightning_module_state_dict = own.module_state
    patched.optimizer_state = own.optimizer_state
    patched.save_checkpoint = own.save
    patched.load_model_state_dict = own.load_model
