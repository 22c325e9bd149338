# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What an editor has committed since a checkpoint, so that the next one need hold nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, cast

import torch
from torch import Tensor

from lightning_edit.checkpoints import seal_of_last
from lightning_edit.optim import E

if TYPE_CHECKING:
    from lightning_edit.modules.base import EditModule

__all__ = ["Journal"]


class Journal(Generic[E]):
    """Keeps the edits that an editor commits from here on, until they are in a checkpoint.

    Args:
        editor: The editor, all of whose edits so far are in a checkpoint.
    """

    def __init__(self, editor: EditModule[E]) -> None:
        self.editor = editor
        #: Checksum of that checkpoint; nothing where it is not known here.
        self.owner = seal_of_last(editor.trainer.strategy)
        self._edits: list[E] = []
        self.begin()

    def begin(self) -> None:
        """Forgets what is in a checkpoint by now."""
        self._edits = []
        self.editor.edit_optimizer.journal = self._edits
        self._carried = self.editor.delta.carried
        self._history, self._rows = self.editor.history, len(self.editor.history)

    @property
    def is_complete(self) -> bool:
        """Whether all that has become of the edits since is that these were added."""
        editor = self.editor
        is_same = editor.edit_optimizer.journal is self._edits and editor.history is self._history
        return is_same and len(self._history) >= self._rows

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context manager: a checkpoint holds what is in the journal, and nothing before it."""
        editor, strategy = self.editor, self.editor.trainer.strategy
        patched = cast(Any, strategy)
        state = {"state": {}, "param_groups": [], "increments": list(self._increments())}
        try:
            # What edits leave in a module follows from the edits.
            patched.lightning_module_state_dict = dict
            patched.optimizer_state = lambda optimizer: state
            editor.history = self._history[self._rows :]
            yield
        finally:
            editor.history = self._history
            for name in ("lightning_module_state_dict", "optimizer_state"):
                vars(strategy).pop(name, None)

    def _increments(self) -> Iterator[dict[str, object]]:
        """What is new with each edit; of what it carries, too."""
        known = self._carried
        for edit in self._edits:
            carried, columns = dict[str, Tensor](), dict[str, Tensor]()
            for name, tensor in edit.carried.items():
                before = known.get(name)
                if before is None or not _goes_on(tensor, before):
                    carried[name] = tensor
                elif tensor.shape != before.shape:
                    columns[name] = tensor[:, before.shape[1] :].clone()
            known = {**known, **edit.carried}
            yield {**edit.increment(), "carried": carried, "columns": columns}


def _goes_on(tensor: Tensor, before: Tensor) -> bool:
    """Whether a tensor is the one before, with columns after its own or without."""
    if tensor is before:
        return True
    if tensor.dtype != before.dtype or tensor.ndim != before.ndim:
        return False
    old = tensor[:, : before.shape[1]] if tensor.ndim == 2 else tensor
    return torch.equal(old, before)
