# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors whose model Lightning's ``ModelParallelStrategy`` divides among processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_edit.checkpoints import load_plainly
from lightning_edit.core.errors import EditError, ModelError
from lightning_edit.core.hashing import quick_hash
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.processes import Processes, tells_of_loss
from lightning_edit.core.request import EditRequest
from lightning_edit.core.sharding import (
    divide_like,
    is_sharded,
    leave_files_,
    lies_in_parts,
    local_shard,
    reshard,
    shard_,
    shard_like,
    split_,
    whole_tensor,
)
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.optim import E
from lightning_edit.passes.borrowing import borrowed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lightning_edit.modules.base import EditModule

__all__ = [
    "asked_of_all",
    "begin_",
    "check_alike",
    "counts",
    "division_of",
    "prepare_strategy",
    "restore_edits",
    "shard_model",
    "together",
]


def prepare_strategy(trainer: Trainer, editor: EditModule[E]) -> None:
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


def _check_strategy(trainer: Trainer, editor: EditModule[E]) -> None:
    name, strategy = type(editor).__name__, trainer.strategy
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise EditError(
            f"{type(strategy).__name__} keeps flat copies of the weights, in which {name} cannot "
            "edit one matrix. Where a model does not fit on one device, set `trainer.strategy` to "
            "`ModelParallelStrategy`; else to `ddp`."
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    sizes = [strategy.device_mesh[f"{kind}_parallel"].size() for kind in ("data", "tensor")]
    divided = [way for way in editor.strategies if way != "ddp"]
    if not divided:
        raise EditError(
            f"{name} does not work on weights that are divided among processes. Set "
            "`trainer.strategy` to `ddp`, by which each process has all of them, or choose an "
            "editor that does: ROME, MEMIT, FineTune or GRACE, for example."
        )
    if _way(strategy.device_mesh) not in divided:
        raise EditError(
            f"`data_parallel_size` is {sizes[0]} and `tensor_parallel_size` {sizes[1]}, but {name} "
            f"works with {', '.join(divided)}. Set "
            f"`data_parallel_size={trainer.world_size}` and `tensor_parallel_size=1`, which is "
            "FSDP2."
        )


def _way(mesh: DeviceMesh) -> str:
    """How a mesh divides weights; by FSDP2 where it has one process."""
    ways = {"data_parallel": "FSDP2", "tensor_parallel": "TP"}
    return "+".join(way for kind, way in ways.items() if mesh[kind].size() > 1) or "FSDP2"


def division_of(editor: EditModule[E]) -> Callable[[nn.Module], None] | None:
    """What has a process keep its part of a model, if the Trainer's strategy divides it."""
    mesh = editor.device_mesh
    return None if mesh is None else functools.partial(_divide_, mesh=mesh)


def _divide_(model: nn.Module, mesh: DeviceMesh) -> None:
    """Has each process keep its part of a model, which may be without weights yet.

    Raises:
        ModelError: If it has an encoder, or no plan by which it can be divided.
    """
    tree = ModelTree.of(model)
    if tree.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} has an encoder; `ModelParallelStrategy` works with "
            "decoder-only models. Set `trainer.strategy` to `ddp`, or choose another model."
        )
    way = _way(mesh)
    if way != "FSDP2":
        split_(model, tree.block_names, mesh["tensor_parallel"])
    if way != "TP":
        shard_(model, tree.blocks, mesh["data_parallel"])


def begin_(editor: EditModule[E], model: nn.Module) -> None:
    """Brings a process's part of a model to its device, and runs the model once, as FSDP2 expects.

    Does nothing to a model that the Trainer's strategy does not divide.
    """
    if editor.device_mesh is None:
        return
    if editor.device_mesh.device_type == "cpu":
        leave_files_(model)
    model.to(editor.device_mesh.device_type)
    row = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad(), borrowed(model):
        model(input_ids=row)
    reshard(model)


def shard_model(editor: EditModule[E]) -> None:
    """Has each process keep its part of an editor's model, if the Trainer's strategy divides it.

    Raises:
        EditError: If edits are committed already, which whole weights were kept of.
        ModelError: If the model has an encoder, or no plan by which it can be divided.
    """
    divide = division_of(editor)
    if divide is None or is_sharded(editor.model):
        return
    if len(editor.delta):
        raise EditError(
            f"{type(editor).__name__} has committed edits to a whole model, which "
            "`ModelParallelStrategy` would divide. Commit them under it from the beginning, or go "
            "on from a checkpoint (`ckpt_path`)."
        )
    divide(editor.model)
    begin_(editor, editor.model)
    editor.adopt(editor.model, editor.tokens.tokenizer)  # what is kept of it is divided, too


def asked_of_all(editor: EditModule[E], batch: list[EditRequest]) -> list[EditRequest]:
    """The requests that every process has to run: those of all, where a pass takes all processes.

    Args:
        editor: The editor.
        batch: This process's share.
    """
    if not is_sharded(editor.model):
        return batch
    parts = Processes.running().objects(batch)
    # Under tensor parallelism all have the same ones.
    return list({request.id: request for part in parts for request in part}.values())


def counts(editor: EditModule[E]) -> bool:
    """Whether what this process has measured is counted: by one process, where all measure it."""
    return not is_sharded(editor.model) or Processes.running().rank == 0


def check_alike(editor: EditModule[E]) -> None:
    """Checks that all processes have committed the same, by a checksum.

    Compared are the edits, what they carry, what a memory holds and, where each process has them
    whole, the edited weights.

    Raises:
        EditError: If they have not.
    """
    one = Processes.running()
    if one.count == 1:
        return
    memory, delta = EditMemory.find(editor.model), editor.delta
    state = {**delta.state_dict(), **delta.carried, **(memory.state_dict() if memory else {})}
    found = {name: quick_hash(tensor) for name, tensor in state.items()}
    weights = editor.target.parameters
    marks = editor.edit_optimizer.marks.items()
    found |= {name: mark for name, mark in marks if not lies_in_parts(weights[name])}
    parts = one.objects(found)
    for name in dict.fromkeys(name for part in parts for name in part):
        if any(part.get(name) != parts[0].get(name) for part in parts):
            raise EditError(
                f"The processes have committed different edits: `{name}` is not the same on all "
                "of them, so that the run stops here. Go on from the last checkpoint "
                "(`ckpt_path='last'`) with `trainer.deterministic=True`, or on one device."
            )


@contextmanager
def together(editor: EditModule[E]) -> Iterator[None]:
    """Context manager: a process that others no longer answer says so.

    Raises:
        EditError: In place of what the process group says.
    """
    one = Processes.running()
    try:
        yield
    except RuntimeError as reason:
        if one.count == 1 or not tells_of_loss(reason):
            raise
        raise EditError(
            f"Process {one.rank} of {one.count} was left alone in an edit of "
            f"{type(editor).__name__}: another one has ended, or did not answer in time "
            f"({' '.join(str(reason).split())[:120]}). Look at what that one said, and go on from "
            "the last checkpoint (`ckpt_path='last'`)."
        ) from reason


class _OneFile(Generic[E]):
    """In the place of a sharded strategy's own ways: one file, of any number of processes.

    Args:
        strategy: The strategy.
        editor: The editor that it runs.
    """

    def __init__(self, strategy: ModelParallelStrategy, editor: EditModule[E]) -> None:
        self.strategy = strategy
        self.editor = editor

    def module_state(self) -> dict[str, Tensor]:
        """The editor's state: of divided weights those that were trained, gathered one by one."""
        reshard(self.editor)
        state = self.editor.state_dict()
        parts = [name for name, tensor in state.items() if lies_in_parts(tensor)]
        trained: dict[str, Tensor] = {}
        if self.editor.automatic_optimization:
            trained = self.editor.fitting.kept(self.editor, state)
        for name in parts:
            tensor = state.pop(name)
            if name in trained:  # others follow from the edits
                state[name] = whole_tensor(tensor).cpu()
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, object]:
        """The state of the optimizer itself, gathered."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = inner.state_dict()
        moments = {
            number: {name: _whole(value) for name, value in found.items()}
            for number, found in state["state"].items()
        }
        return {**state, "state": moments}

    def save(
        self, checkpoint: dict[str, object], filepath: str | Path, storage_options: object = None
    ) -> None:
        """Writes the file, by the first process."""
        Strategy.save_checkpoint(self.strategy, checkpoint, filepath, storage_options)

    def load_model(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads what the file holds of the editor, and of its optimizer, each process its part."""
        reshard(self.editor)
        named = dict(self.editor.named_parameters())
        parts = {name: p for name, p in named.items() if lies_in_parts(p)}
        state = dict(checkpoint["state_dict"])
        for name in parts.keys() & state.keys():
            whole = state.pop(name)
            if self.editor.automatic_optimization:  # else the edits have written it
                local_shard(parts[name]).copy_(shard_like(parts[name], whole))
        Strategy.load_model_state_dict(self.strategy, {"state_dict": state}, strict)
        if self.editor.automatic_optimization:
            for optimizer, saved in zip(
                self.strategy.optimizers, checkpoint.get("optimizer_states", ()), strict=False
            ):
                optimizer.load_state_dict(_divided(saved, optimizer))


def restore_edits(editor: EditModule[E], checkpoint: Mapping[str, Any]) -> None:
    """Takes over the edits in a checkpoint, and writes them where nobody loads edited weights.

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
            if is_sharded(editor.model) or not weights <= checkpoint["state_dict"].keys():
                editor.edit_optimizer.rewind(editor.delta)


def _save_in_one_file(strategy: ModelParallelStrategy, editor: EditModule[E]) -> None:
    """Has checkpoints of a sharded editor be those of one process.

    They hold edits, what is carried from one to the next and what a memory remembers, which are
    the same on every process. Edited weights follow from the base and the edits.
    """
    own, patched = _OneFile(strategy, editor), cast(Any, strategy)
    patched.lightning_module_state_dict = own.module_state
    patched.optimizer_state = own.optimizer_state
    patched.save_checkpoint = own.save
    patched.load_model_state_dict = own.load_model


def _whole(value: object) -> object:
    return whole_tensor(value).cpu() if isinstance(value, Tensor) else value


def _divided(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, object]:
    """An optimizer's state with what belongs to a divided parameter divided like it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def divided(number: int, value: object) -> object:
        if isinstance(value, Tensor) and value.shape == parameters[number].shape:
            return divide_like(parameters[number], value)
        return value

    moments = {
        number: {name: divided(number, value) for name, value in found.items()}
        for number, found in state["state"].items()
    }
    return {**state, "state": moments}
