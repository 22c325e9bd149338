# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Data of editors that are trained: some requests to learn from, others to be measured by."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule
from typing_extensions import override

from lightning_edit.checkpoints import PlainCheckpoints
from lightning_edit.core.request import EditRequest
from lightning_edit.data.base import EditDataModule
from lightning_edit.data.loader import RequestLoader, ResumableRequestLoader

__all__ = ["HeldOut"]


class HeldOut(PlainCheckpoints, LightningDataModule):
    """Trains on the requests of one data module and measures on those of another.

    Args:
        train: Requests to learn from; an editor in training needs a rephrase and a locality probe
            with each.
        held_out: Requests for ``validate``, within ``fit``, too, and for all other verbs.

    Examples:
        >>> from lightning_edit.demos import tiny_requests
        >>> requests = tiny_requests(3)
        >>> data = HeldOut(EditDataModule(requests[:2]), EditDataModule(requests[2:]))
        >>> len(data.train_dataloader()), len(data.val_dataloader())
        (2, 1)
    """

    def __init__(self, train: EditDataModule, held_out: EditDataModule) -> None:
        super().__init__()
        self.train = train
        self.held_out = held_out

    @property
    def requests(self) -> list[EditRequest]:
        """The held-out requests, by which an editor is judged."""
        return self.held_out.requests

    @override
    def prepare_data(self) -> None:
        for data in (self.train, self.held_out):
            data.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        for data in (self.train, self.held_out):
            data.trainer = self.trainer
            data.setup(stage)

    @override
    def train_dataloader(self) -> ResumableRequestLoader:
        return self.train.train_dataloader()

    @override
    def val_dataloader(self) -> RequestLoader:
        return self.held_out.val_dataloader()

    @override
    def test_dataloader(self) -> RequestLoader:
        return self.held_out.test_dataloader()

    @override
    def predict_dataloader(self) -> RequestLoader:
        return self.held_out.predict_dataloader()

    @override
    def state_dict(self) -> dict[str, dict[str, object]]:
        return {"train": self.train.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, dict[str, object]]) -> None:
        self.train.load_state_dict(state_dict["train"])
