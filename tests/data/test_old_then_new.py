# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from lightning_edit.core.errors import EditError
from lightning_edit.core.request import EditRequest
from lightning_edit.data import EditDataModule, OldThenNew
from lightning_edit.demos import tiny_requests


class Witness(LightningModule):
    """Writes down what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.seen: dict[str, list[Any]] = {"fit": [], "validate": [], "test": [], "predict": []}

    def _see(self, verb: str, batch: Any) -> Tensor:
        self.seen[verb].append([getattr(item, "target_new", item) for item in batch])
        output: Tensor = self.linear(torch.ones(1, 1)).sum()
        return output

    def training_step(self, batch: Any) -> Tensor:
        return self._see("fit", batch)

    def validation_step(self, batch: Any) -> None:
        self._see("validate", batch)

    def test_step(self, batch: Any) -> None:
        self._see("test", batch)

    def predict_step(self, batch: Any) -> Tensor:
        return self._see("predict", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NoValidation(Witness):
    """Does not validate."""

    validation_step = LightningModule.validation_step  # type: ignore[assignment]


def _loader(*items: str) -> Any:
    return torch.utils.data.DataLoader([[item] for item in items], batch_size=None)  # type: ignore


def _trainer(max_epochs: int = 3, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=max_epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"reload_dataloaders_every_n_epochs": 1, **settings},
    )


def _new() -> EditDataModule:
    return EditDataModule(requests=tiny_requests(3), batch_size=2)


def test_serves_the_old_and_then_the_new() -> None:
    module, data = Witness(), OldThenNew(_new(), forget_epochs=2)
    trainer = _trainer()
    trainer.fit(module, data)
    old = [["Dorin", "Velmic"], ["Assel"]]
    new = [["Kettleby", "Ostrish"], ["Brune"]]
    assert module.seen["fit"] == [*old, *old, *new]
    assert [r.target_new for r in data.old_requests] == ["Dorin", "Velmic", "Assel"]
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)
    everything = [["Kettleby", "Ostrish", "Brune"]]
    assert module.seen["validate"] == everything * 3
    assert module.seen["test"] == module.seen["predict"] == everything


def test_two_data_modules_and_two_loaders() -> None:
    old = EditDataModule(requests=_new().old_requests, batch_size=3)
    module = Witness()
    _trainer(2).fit(module, OldThenNew(_new(), 1, old=old))
    assert module.seen["fit"][0] == ["Dorin", "Velmic", "Assel"]
    module = NoValidation()
    data = OldThenNew.from_dataloaders(_loader("a", "b"), _loader("c"), forget_epochs=1)
    _trainer(3).fit(module, data)
    assert module.seen["fit"] == [["a"], ["b"], ["c"], ["c"]]
    assert data.old_requests == []


def test_data_without_validation_get_none() -> None:
    class TrainOnly(LightningDataModule):
        def train_dataloader(self) -> Any:
            return _loader("x")

    module = NoValidation()
    _trainer(2).fit(module, OldThenNew(TrainOnly(), 1, old=TrainOnly()))
    assert module.seen["fit"] == [["x"], ["x"]]


def test_hooks_and_state_are_those_of_the_new_data() -> None:
    class Hooked(EditDataModule):
        called: list[str]

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.called = []

        def prepare_data(self) -> None:
            self.called.append("prepare_data")

        def setup(self, stage: str) -> None:
            assert self.trainer is not None
            self.called += ["setup", stage]

        def teardown(self, stage: str) -> None:
            self.called += ["teardown", stage]

        def on_before_batch_transfer(self, batch: list[EditRequest], dataloader_idx: int) -> Any:
            return [request.subject for request in batch]

        def state_dict(self) -> dict[str, Any]:
            return {"calls": len(self.called)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.called.append(f"load {state_dict['calls']}")

    new = Hooked(requests=tiny_requests(1))
    old = Hooked(requests=tiny_requests(5)[4:])
    data, module = OldThenNew(new, 1, old=old), Witness()
    _trainer(2, limit_val_batches=0).fit(module, data)
    # Batches pass through the hook of the new data in both phases.
    assert module.seen["fit"] == [["Ostrane"], ["Velmora"]]
    assert new.called == old.called == ["prepare_data", "setup", "fit", "teardown", "fit"]
    data.load_state_dict(data.state_dict())
    assert new.called[-1] == old.called[-1] == "load 5"


def test_errors_say_what_to_do() -> None:
    with pytest.raises(EditError, match=r"Set `Trainer\(reload_dataloaders_every_n_epochs=1\)`"):
        _trainer(2, reload_dataloaders_every_n_epochs=0).fit(Witness(), OldThenNew(_new(), 1))
    with pytest.raises(EditError, match="LightningDataModule has no `old_dataloader`"):
        OldThenNew(LightningDataModule(), 1)
    with pytest.raises(EditError, match="0 or more, got -1"):
        OldThenNew(_new(), -1)
    # Nothing is to be switched, so nothing is to be reloaded.
    module = Witness()
    _trainer(1, reload_dataloaders_every_n_epochs=0).fit(module, OldThenNew(_new(), 0))
    assert module.seen["fit"][0] == ["Kettleby", "Ostrish"]
