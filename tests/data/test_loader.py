# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Loaders: every rank what it should get, and a resumed run exactly what is left."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_edit.core.errors import RequestError
from lightning_edit.core.request import EditRequest
from lightning_edit.data import EditDataModule, RequestLoader, ResumableRequestLoader
from tests.data.test_base import people
from tests.data.two_processes import see
from tests.processes import run_pair


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_requests_are_shared_without_repeats_in_equally_many_batches(
    count: int, subtests: pytest.Subtests
) -> None:
    for replicas, batch_size in itertools.product((1, 2, 3), (1, 2, 16)):
        with subtests.test(replicas=replicas, batch_size=batch_size):
            assert_shared(count, replicas, batch_size)


def assert_shared(count: int, replicas: int, batch_size: int) -> None:
    loaders = [RequestLoader(people(count), batch_size, replicas, rank) for rank in range(replicas)]
    shares = [[request for batch in loader for request in batch] for loader in loaders]
    assert sorted(request.id for share in shares for request in share) == [
        request.id for request in people(count)
    ]
    lengths = {len(list(loader)) for loader in loaders}
    assert lengths == {len(loader) for loader in loaders}
    assert len(lengths) == 1
    assert min(lengths) >= 1
    assert all(len(batch) <= batch_size for loader in loaders for batch in loader)
    assert shares[0] == people(count)[::replicas]


def test_a_batch_has_an_index() -> None:
    loader = RequestLoader(people(3), 2)
    assert loader[1] == people(3)[2:]
    with pytest.raises(IndexError, match="Batch 2 of 2"):
        loader[2]


def test_cases_stay_together_in_all_verbs_but_fit() -> None:
    named = ["", "x", "x", "y", "y", "y"]
    requests = [replace(r, case=case) for r, case in zip(people(6), named, strict=True)]
    data = EditDataModule(requests=requests, eval_batch_size=2)
    assert [len(batch) for batch in data.test_dataloader()] == [3, 3]
    shares = [RequestLoader(requests, 1, 2, rank) for rank in range(2)]
    assert [[len(batch) for batch in loader] for loader in shares] == [[1, 3], [2, 0]]
    assert [len(batch) for batch in data.train_dataloader()] == [1] * 6


class Diary(LightningModule):
    """Writes down the requests it was asked to edit."""

    def __init__(self, fail_at: str | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []
        self.fail_at = fail_at

    def training_step(self, batch: list[EditRequest]) -> Tensor:
        if self.fail_at in (names := [request.id for request in batch]):
            raise RuntimeError("power cut")
        self.seen.append(names)
        return self.weight * len(batch)

    def validation_step(self, batch: list[EditRequest]) -> None:
        assert batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, *callbacks: Any, **kwargs: Any) -> Trainer:
    return Trainer(
        **{"max_epochs": 2, **kwargs},
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )


class SaveEveryStep(Callback):
    """Saves where ModelCheckpoint does, but has no state of its own to be missed on resume."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}-validated.ckpt")

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / "exception.ckpt")


@pytest.mark.parametrize("interval", [1, 1.0])
def test_a_resumed_run_sees_exactly_the_remaining_requests(tmp_path: Path, interval: float) -> None:
    whole = Diary()
    data = EditDataModule(requests=people(5), batch_size=2)
    trainer(tmp_path, SaveEveryStep(tmp_path), val_check_interval=interval).fit(whole, data)
    assert whole.seen == [["p0", "p1"], ["p2", "p3"], ["p4"]] * 2
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 6 + (6 if isinstance(interval, int) else 2)
    for path in paths:
        step = int(path.stem.removesuffix("-validated"))
        rest = Diary()
        resumed = trainer(tmp_path, val_check_interval=interval)
        data = EditDataModule(requests=people(5), batch_size=2)
        resumed.fit(rest, data, ckpt_path=path, weights_only=True)
        assert rest.seen == whole.seen[step:], path.name
        assert resumed.global_step == 6
        assert torch.equal(rest.weight, whole.weight)


def test_limited_epochs_begin_at_the_first_request(tmp_path: Path) -> None:
    whole = Diary()
    data = EditDataModule(requests=people(5))
    trainer(tmp_path, SaveEveryStep(tmp_path), limit_train_batches=2).fit(whole, data)
    assert whole.seen == [["p0"], ["p1"]] * 2
    for step in range(1, 5):
        rest = Diary()
        data = EditDataModule(requests=people(5))
        path = tmp_path / f"{step}.ckpt"
        trainer(tmp_path, limit_train_batches=2).fit(rest, data, ckpt_path=path)
        assert rest.seen == whole.seen[step:], step


def test_a_run_stopped_by_max_steps_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = Diary()
    data = EditDataModule(requests=people(5))
    trainer(tmp_path, SaveEveryStep(tmp_path), max_epochs=-1, max_steps=2).fit(first, data)
    rest = Diary()
    resumed = trainer(tmp_path, max_epochs=-1, max_steps=5)
    resumed.fit(rest, EditDataModule(requests=people(5)), ckpt_path=tmp_path / "2.ckpt")
    assert first.seen + rest.seen == [[f"p{i}"] for i in range(5)]


def test_an_edit_that_was_cut_off_is_repeated(tmp_path: Path) -> None:
    broken = Diary(fail_at="p3")
    data = EditDataModule(requests=people(5))
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path, SaveEveryStep(tmp_path)).fit(broken, data)
    rest = Diary()
    path = tmp_path / "exception.ckpt"
    data = EditDataModule(requests=people(5))
    trainer(tmp_path, max_epochs=1).fit(rest, data, ckpt_path=path)
    assert broken.seen + rest.seen == [[f"p{i}"] for i in range(5)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"requests": people(5), "batch_size": 2}, "batch_size. differ.*1 then, 2 now"),
        ({"requests": people(6)}, "after 2 batches .* requests differ"),
        ({"requests": people(5), "seed": 3}, "same requests, order"),
    ],
)
def test_other_requests_are_refused_within_an_epoch(
    tmp_path: Path, kwargs: dict[str, Any], message: str
) -> None:
    trainer(tmp_path, SaveEveryStep(tmp_path)).fit(Diary(), EditDataModule(requests=people(5)))
    path = tmp_path / "2.ckpt"
    with pytest.raises(RequestError, match=message):
        trainer(tmp_path).fit(Diary(), EditDataModule(**kwargs), ckpt_path=path)


def test_other_requests_may_follow_a_finished_epoch(tmp_path: Path) -> None:
    data = EditDataModule(requests=people(2))
    trainer(tmp_path, SaveEveryStep(tmp_path), max_epochs=1).fit(Diary(), data)
    rest = Diary()
    data = EditDataModule(requests=people(4), offset=2)
    trainer(tmp_path).fit(rest, data, ckpt_path=tmp_path / "2.ckpt")
    assert rest.seen == [["p2"], ["p3"]]


def test_a_position_is_used_for_one_pass() -> None:
    loader = ResumableRequestLoader(people(3), 1, lambda: 2)
    state = loader.state_dict()
    fresh = ResumableRequestLoader(people(3), 1)
    fresh.load_state_dict(state)
    assert [len(list(fresh)) for _ in range(2)] == [1, 3]


def test_two_processes(tmp_path: Path) -> None:
    run_pair(see, tmp_path)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    everything = [["p0", "p1"], ["p2", "p3"], ["p4"]]
    for rank in range(2):
        assert seen[rank]["fit"] == everything
        assert seen[rank]["resumed"] == everything[2:]
    assert [seen[rank]["validate"] for rank in range(2)] == [[["p0", "p2", "p4"]], [["p1", "p3"]]]
    assert [seen[rank]["predict"] for rank in range(2)] == [[["p0", "p2", "p4"]], [["p1", "p3"]]]
    assert [seen[rank]["count"] for rank in range(2)] == [5, 5]
    # The second process has nothing to judge, and takes part.
    assert [seen[rank]["single"] for rank in range(2)] == [[["p0"]], [[]]]
    assert [seen[rank]["single_count"] for rank in range(2)] == [1, 1]
