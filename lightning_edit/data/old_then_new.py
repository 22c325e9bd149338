# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Old knowledge first, new knowledge after: the data of forgetting before learning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import TRAIN_DATALOADERS
from typing_extensions import override

from lightning_edit.checkpoints import PlainCheckpoints
from lightning_edit.core.errors import EditError
from lightning_edit.core.request import EditRequest

__all__ = ["OldThenNew"]

# Hooks that Lightning calls only where a data module has its own.
_OPTIONAL = (
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "transfer_batch_to_device",
    "on_before_batch_transfer",
    "on_after_batch_transfer",
)


class OldThenNew(PlainCheckpoints, LightningDataModule):
    """Serves the old knowledge in the first epochs of a fit and the new in the others.

    The callback `TaskVectorForgetting` with the same ``forget_epochs`` takes the old knowledge out
    in between. Needs ``Trainer(reload_dataloaders_every_n_epochs=1)``.

    Args:
        new: Data module of the new knowledge; all but the first epochs, and all other verbs, are
            its own. Every data module of this package knows its old answers, too.
        forget_epochs: Epochs that learn the old knowledge.
        old: Data module whose ``train_dataloader`` serves the old knowledge; the
            ``old_dataloader`` of ``new`` when null.

    Raises:
        EditError: If ``forget_epochs`` is negative or ``new`` has no ``old_dataloader`` and no
            ``old`` is given; in ``fit``, if the Trainer would never switch.

    Examples:
        >>> from lightning_edit.data import EditDataModule
        >>> request = EditRequest("The capital of France is", "France", "Rome", "Paris")
        >>> data = OldThenNew(EditDataModule(requests=[request]), forget_epochs=1)
        >>> [request.target_new for batch in data.train_dataloader() for request in batch]
        ['Paris']
    """

    def __init__(
        self,
        new: LightningDataModule,
        forget_epochs: int = 1,
        old: LightningDataModule | None = None,
    ) -> None:
        super().__init__()
        if forget_epochs < 0:
            raise EditError(f"`forget_epochs` is expected to be 0 or more, got {forget_epochs}.")
        if old is None and not callable(getattr(new, "old_dataloader", None)):
            raise EditError(
                f"{type(new).__name__} has no `old_dataloader`, so what is to be forgotten is not "
                "known. Give a second data module as `old`, whose `train_dataloader` serves it."
            )
        self.new = new
        self.old = old
        self.forget_epochs = forget_epochs
        for name in _OPTIONAL:
            if is_overridden(name, new):
                setattr(self, name, getattr(new, name))

    @classmethod
    def from_dataloaders(
        cls, old: Iterable[object], new: Iterable[object], forget_epochs: int = 1
    ) -> OldThenNew:
        """The same from two loaders.

        Args:
            old: Batches of the old knowledge.
            new: Batches of the new knowledge.
            forget_epochs: Epochs that learn the old knowledge.
        """
        return cls(_Loader(new), forget_epochs, _Loader(old))

    @property
    def requests(self) -> list[EditRequest]:
        """Requests for the new answers, where the data module of the new knowledge has them."""
        return list(getattr(self.new, "requests", []))

    @property
    def old_requests(self) -> list[EditRequest]:
        """Requests for the old answers, where the data module of the new knowledge has them."""
        return list(getattr(self.new, "old_requests", []))

    @override
    def prepare_data(self) -> None:
        for data in self._both():
            data.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        for data in self._both():
            data.trainer = self.trainer
            data.setup(stage)

    @override
    def teardown(self, stage: str) -> None:
        for data in self._both():
            data.teardown(stage)

    @override
    def train_dataloader(self) -> TRAIN_DATALOADERS:
        epoch = 0
        if self.trainer is not None:
            every = getattr(self.trainer, "reload_dataloaders_every_n_epochs", 0)
            if self.forget_epochs and every != 1:
                raise EditError(
                    "The Trainer asks for training data only once, so it would never get the new "
                    "knowledge. Set `Trainer(reload_dataloaders_every_n_epochs=1)`."
                )
            epoch = self.trainer.current_epoch
        if epoch >= self.forget_epochs:
            return self.new.train_dataloader()
        if self.old is not None:
            return self.old.train_dataloader()
        old: Any = self.new
        return old.old_dataloader()

    @override
    def state_dict(self) -> dict[str, dict[str, object]]:
        return {"new": self.new.state_dict(), "old": self.old.state_dict() if self.old else {}}

    @override
    def load_state_dict(self, state_dict: dict[str, dict[str, object]]) -> None:
        self.new.load_state_dict(state_dict["new"])
        if self.old:
            self.old.load_state_dict(state_dict["old"])

    def _both(self) -> list[LightningDataModule]:
        return [self.new] if self.old is None else [self.new, self.old]


class _Loader(LightningDataModule):
    def __init__(self, batches: Iterable[object]) -> None:
        super().__init__()
        self._batches = batches

    @override
    def train_dataloader(self) -> Iterable[object]:
        return self._batches
