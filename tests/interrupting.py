# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A callback that sends its own process a signal at a chosen place of a run."""

from __future__ import annotations

import os
import signal
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_edit import EditModule

__all__ = ["Interrupt"]


class Interrupt(Callback):
    """Sends a signal once.

    Args:
        signal_name: Such as ``SIGKILL``.
        step: Number of committed steps at which it is sent.
        place: ``between`` edits, in the ``middle`` of the next edit, or after the next edit is
            ``committed`` and before its checkpoint is written.
    """

    def __init__(
        self,
        signal_name: str,
        step: int,
        place: Literal["between", "middle", "committed"] = "between",
    ) -> None:
        self.number = signal.Signals[signal_name]
        if self.number == signal.SIGINT:
            # Jobs in the background ignore it, and so do their children unless told otherwise.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.step = step
        self.place = place

    def send(self, *_: Any) -> None:
        os.kill(os.getpid(), self.number)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self.step:
            return
        if self.place == "between":
            self.send()
        elif self.place == "middle":
            passes = 0

            def count(*_: Any) -> None:
                nonlocal passes
                passes += 1
                if passes == 5:
                    self.send()

            assert isinstance(pl_module, EditModule)
            pl_module.tree.blocks[-1].register_forward_hook(count)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.place == "committed" and trainer.global_step == self.step + 1:
            self.send()
