# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""metrics/collection.py: names, separate states, and logging through Lightning."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection

from lightning_edit.core.request import PORTABILITY_KINDS
from lightning_edit.metrics import (
    EditMetric,
    Generality,
    Locality,
    Portability,
    Reliability,
    edit_metrics,
)

FOUR = ("reliability", "generality", "locality", "portability")
READINGS = ("teacher_forced", "autoregressive")


def test_keys_are_those_of_reports() -> None:
    metrics = edit_metrics()
    expected = {f"{metric}/{reading}" for metric in FOUR for reading in READINGS}
    expected |= {f"portability/{kind}/{r}" for kind in PORTABILITY_KINDS for r in READINGS}
    assert set(metrics) == expected
    for key, metric in metrics.items():
        assert isinstance(metric, EditMetric)
        assert metric.key == key


def test_prefix_readings_and_kinds() -> None:
    metrics = edit_metrics("val/", readings=["autoregressive"], kinds=["cause"])
    keys = {"val/portability/cause/autoregressive"}
    assert set(metrics) == keys | {f"val/{metric}/autoregressive" for metric in FOUR}
    # Members answer to both names.
    assert metrics["val/locality/autoregressive"] is metrics["locality/autoregressive"]
    with pytest.raises(ValueError, match="`kind`"):
        edit_metrics(kinds=["a.b"])


def test_states_are_not_shared_by_metrics_that_agree_at_first() -> None:
    metrics = edit_metrics(readings=["teacher_forced"], kinds=[])
    # The trap: on the first batch all agree.
    metrics.update(torch.tensor([[1]]), torch.tensor([[1]]))
    metrics["generality/teacher_forced"].update(torch.tensor([[1]]), torch.tensor([[2]]))
    metrics.update(torch.tensor([[1]]), torch.tensor([[1]]))
    assert metrics.compute_groups == {}
    values = metrics.compute()
    assert values["reliability/teacher_forced"] == 1
    assert values["generality/teacher_forced"].item() == pytest.approx(2 / 3)


def test_even_the_default_collection_does_not_merge_them() -> None:
    metrics = MetricCollection(
        {
            "a": Reliability(),
            "b": Generality(),
            "c": Locality(),
            "d": Portability(),
            "e": Portability(kind="one_hop"),
            "f": Reliability(strict=True),
        }
    )
    metrics.update(torch.tensor([[1]]), torch.tensor([[1]]))
    assert len(metrics.compute_groups) == 6


def test_empty_collection_computes_nan_quietly() -> None:
    values = edit_metrics().compute()
    assert len(values) == 2 * (4 + len(PORTABILITY_KINDS))
    assert all(math.isnan(value) for value in values.values())


def test_pickle_and_clone() -> None:
    metrics = edit_metrics("test/")
    metrics["reliability/teacher_forced"].update(torch.tensor([[1]]), torch.tensor([[1]]))
    twin = pickle.loads(pickle.dumps(metrics))  # noqa: S301 (our own bytes)
    other = metrics.clone(prefix="val/")
    metrics.reset()
    assert twin.compute()["test/reliability/teacher_forced"] == 1
    assert other.compute()["val/reliability/teacher_forced"] == 1


class Scored(LightningModule):
    """Validates 1000 rows of which half are right."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.metrics = edit_metrics("val/", readings=["teacher_forced"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        (target,) = batch
        ids = torch.ones(len(target), 1, dtype=torch.long)
        self.metrics["reliability/teacher_forced"].update(ids, target.long()[:, None])
        self.log_dict(self.metrics, batch_size=len(target))


def test_lightning_logs_exact_rates_under_bf16_true(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    rows = torch.tensor([0.0, 1.0] * 500)
    loader = DataLoader(TensorDataset(rows), batch_size=7)
    model = Scored()
    for _ in range(2):
        (logged,) = trainer.validate(model, loader, verbose=False)
        assert next(model.parameters()).dtype == torch.bfloat16
        assert logged["val/reliability/teacher_forced"] == 0.5
        assert math.isnan(logged["val/generality/teacher_forced"])
