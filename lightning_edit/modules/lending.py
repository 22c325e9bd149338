# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A model on loan to a Trainer: as its verbs need it, and given back when they end or fail."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Self, TypeVar, cast

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerStatus

from lightning_edit.core.errors import EditError, ModelError
from lightning_edit.modules.targets import Target
from lightning_edit.optim import E
from lightning_edit.passes.borrowing import borrowed

__all__ = ["Lending", "check_trainer", "loaded"]

T = TypeVar("T")


def check_trainer(trainer: Trainer, stage: str) -> None:
    """Checks that a Trainer runs an editor so that weights and their record stay together.

    Raises:
        EditError: If it would convert the weights, or edit them in processes that it starts.
    """
    if trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise EditError(
            f"`trainer.precision` is {trainer.precision!r}, by which Lightning would convert the "
            "weights after their originals were kept. Give the editor its `dtype` instead, such as "
            "`dtype='bfloat16'`."
        )
    if stage == "fit" and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise EditError(
            "`ddp_spawn`, `ddp_fork` and `ddp_notebook` edit in processes of their own, from which "
            "weights come back without the record of what changed them. Start with "
            "`strategy='ddp'`, or in a notebook with `devices=1`."
        )


class Lending:
    """Lends a model to a Trainer until its strategy is torn down, which it is after errors, too."""

    def __init__(self) -> None:
        self._stack: ExitStack | None = None

    def __deepcopy__(self, memo: object) -> Self:
        """What is copied from a module on loan, as averages of weights are, is not lent itself."""
        return type(self)()

    def begin(self, trainer: Trainer, target: Target[E]) -> None:
        """Brings the model into the form that the running verb needs; again, changes nothing.

        Args:
            trainer: The Trainer that runs.
            target: What is edited in the model.
        """
        if self._stack is None:
            self._stack = ExitStack()
            self._end_with(trainer, target)
            self._stack.enter_context(borrowed(target.model, target.trainable))
        target.prepare(trainer.state.fn.value if trainer.state.fn is not None else "")

    def _end_with(self, trainer: Trainer, target: Target[E]) -> None:
        # A module's own `teardown` is not called after errors, and callbacks hear of them before
        # the strategy has moved the model.
        strategy = cast(Any, trainer.strategy)
        usual = strategy.teardown

        def teardown() -> None:
            del strategy.teardown  # the class's own is back
            stack, self._stack = self._stack, None
            with stack or ExitStack():
                usual()
                failed = trainer.state.status == TrainerStatus.INTERRUPTED
                # Of several processes the others may wait elsewhere for ever.
                if not failed or trainer.world_size == 1:
                    target.prepare("")

        strategy.teardown = teardown


def loaded(part: T | None) -> T:
    """A part of an editor that there is once its model is loaded.

    Raises:
        ModelError: If it is not.
    """
    if part is None:
        raise ModelError("The model is not loaded yet. Call `configure_model()` first.")
    return part
