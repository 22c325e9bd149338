# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""metrics/base.py: exact counting under every treatment that torchmetrics and Lightning give it."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_edit.core.errors import MissingDependencyError
from lightning_edit.functional import wilson_interval
from lightning_edit.metrics import (
    CountingMetric,
    EditMetric,
    EditScore,
    EfficacySuccess,
    Generality,
    Locality,
    NeighborhoodSuccess,
    ParaphraseSuccess,
    Portability,
    Reliability,
)

RATES: list[type[EditMetric]] = [
    EfficacySuccess,
    Generality,
    Locality,
    NeighborhoodSuccess,
    ParaphraseSuccess,
    Portability,
    Reliability,
]
EVERY: list[type[CountingMetric]] = [*RATES, EditScore]


def make(cls: type[Any]) -> Any:
    return cls()


def dtypes(metric: CountingMetric) -> set[torch.dtype]:
    return {state.dtype for state in metric.metric_state.values() if isinstance(state, Tensor)}


@pytest.fixture(params=RATES, ids=lambda cls: str(cls.__name__))
def metric(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def test_mean_count_and_interval(metric: EditMetric) -> None:
    assert metric.update_count == 0
    metric.update_scores(torch.tensor([1.0, 0.0, 0.25]))
    assert metric.update_count == 1
    assert metric.compute().item() == pytest.approx(1.25 / 3)
    metric.update_scores(torch.tensor([True]))
    assert metric.compute().item() == 2.25 / 4
    assert metric.compute().dtype == torch.float64
    assert metric.count() == 4
    assert metric.interval() == wilson_interval(2.25 / 4, 4)
    assert metric.interval(level=0.5) == wilson_interval(2.25 / 4, 4, 0.5)
    metric.reset()
    assert metric.count() == 0


def test_thirds_are_rounded_not_cut(metric: EditMetric) -> None:
    metric.update_scores(torch.full((3000,), 1 / 3))
    metric.update_scores(torch.full((3000,), 2 / 3, dtype=torch.float64))
    assert metric.compute().item() == pytest.approx(0.5, abs=1e-8)
    metric.reset()
    # Three quarters of the unit, 2**-32, are one unit.
    metric.update_scores(torch.tensor([0.75 * 2**-32]))
    assert metric.compute().item() == 2**-32


@pytest.mark.filterwarnings("error")
def test_no_rows_is_nan_without_a_warning(metric: EditMetric) -> None:
    assert math.isnan(metric.compute())
    assert metric.count() == 0
    assert all(math.isnan(end) for end in metric.interval())
    metric.update_scores(torch.empty(0))
    assert math.isnan(metric.compute())
    assert math.isnan(EditScore().compute())


@pytest.mark.parametrize("move", ["to", "bfloat16", "half", "set_dtype", "parent"])
def test_half_precision_cannot_touch_the_counts(metric: EditMetric, move: str) -> None:
    # A bfloat16 counter stops at 256, and then half right looks like all right.
    rows = torch.tensor([1.0, 0.0] * 10)
    metric.update_scores(rows)
    if move == "to":
        metric.to(torch.bfloat16)
    elif move == "bfloat16":
        metric.bfloat16()
    elif move == "half":
        metric.half()
    elif move == "set_dtype":
        metric.set_dtype(torch.bfloat16)
    else:
        torch.nn.ModuleDict({"metric": metric}).to(dtype=torch.bfloat16)
    for _ in range(49):
        metric.update_scores(rows.bfloat16())
    assert dtypes(metric) == {torch.long}
    assert metric.count() == 1000
    assert metric.compute().item() == 0.5
    metric.reset()
    assert dtypes(metric) == {torch.long}


def test_any_split_into_batches_gives_the_same_bits() -> None:
    scores = torch.rand(97, generator=torch.Generator().manual_seed(0))
    whole, parts, backwards = Reliability(), Reliability(), Reliability()
    whole.update_scores(scores)
    for part in torch.split(scores, 5):
        parts.update_scores(part)
    backwards.update_scores(scores.flip(0))
    assert whole.compute() == parts.compute() == backwards.compute()
    assert whole.compute().item() == pytest.approx(scores.double().mean().item(), abs=1e-9)


def test_merge_state_also_after_compute(metric: EditMetric) -> None:
    other = copy.deepcopy(metric)
    metric.update_scores(torch.tensor([1.0]))
    other.update_scores(torch.tensor([0.0, 0.0, 0.0]))
    assert metric.compute() == 1
    metric.merge_state(other)
    assert metric.compute() == 0.25
    metric.merge_state(other.metric_state)
    assert metric.compute().item() == pytest.approx(1 / 7)
    assert metric.count() == 7


def test_merging_different_metrics_is_refused() -> None:
    with pytest.raises(ValueError, match="instance of Reliability"):
        Reliability().merge_state(Generality())
    with pytest.raises(ValueError, match="to be present"):
        Reliability().merge_state(Reliability(reading="autoregressive"))


@pytest.mark.parametrize("copying", ["pickle", "deepcopy", "clone"])
def test_copies_count_on_by_themselves(metric: EditMetric, copying: str) -> None:
    metric.update_scores(torch.tensor([1.0]))
    if copying == "pickle":
        twin: EditMetric = pickle.loads(pickle.dumps(metric))  # noqa: S301 (our own bytes)
    else:
        twin = copy.deepcopy(metric) if copying == "deepcopy" else metric.clone()  # type: ignore[assignment]
    twin.update_scores(torch.tensor([0.0]))
    assert metric.compute() == 1
    assert twin.compute() == 0.5
    twin.reset()
    assert math.isnan(twin.compute())


def test_state_dict_round_trip_when_persistent(metric: EditMetric) -> None:
    metric.update_scores(torch.tensor([1.0, 0.5]))
    assert not metric.state_dict()
    metric.persistent(True)
    saved = metric.state_dict()
    metric.reset()
    metric.load_state_dict(saved)
    assert metric.compute() == 0.75


def test_forward_gives_the_batch_and_keeps_the_sum() -> None:
    metric = EfficacySuccess()
    assert metric(torch.tensor([0.0]), torch.tensor([1.0])) == 1
    assert metric(torch.tensor([1.0]), torch.tensor([0.0])) == 0
    assert metric.compute() == 0.5


def test_scores_under_autograd_and_inference_mode() -> None:
    metric = Reliability()
    metric.update_scores(torch.ones(2, requires_grad=True))
    with torch.inference_mode():
        metric.update_scores(torch.zeros(1))
        metric.reset()
        metric.update_scores(torch.zeros(1))
    metric.update_scores(torch.ones(3))
    assert metric.compute() == 0.75


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.tensor([0.5, 1.5]), r"\[0, 1\]"),
        (torch.tensor([-0.1]), r"\[0, 1\]"),
        (torch.tensor([math.nan]), "nan"),
        (torch.tensor(1.0), r"shape \[B\]"),
        (torch.ones(2, 2), r"shape \[B\]"),
    ],
)
def test_scores_that_are_none(scores: Tensor, message: str) -> None:
    metric = Generality()
    with pytest.raises(ValueError, match=message):
        metric.update_scores(scores)
    assert metric.count() == 0


def test_constants_and_state_names_differ() -> None:
    names = [name for cls in EVERY for name in make(cls).metric_state]
    assert len(names) == len(set(names)) == 2 * len(RATES) + 6
    for cls in EVERY:
        assert issubclass(cls, Metric)
        assert cls.full_state_update is False
        assert cls.higher_is_better is True
        assert cls.is_differentiable is False
        assert (cls.plot_lower_bound, cls.plot_upper_bound) == (0, 1)


def test_reductions_are_sums() -> None:
    for cls in EVERY:
        both = torch.tensor([3, 4])
        assert all(reduce(both) == 7 for reduce in make(cls)._reductions.values())


def test_interval_of_a_metric_synced_by_hand() -> None:
    def gather(state: Tensor, group: Any = None) -> list[Tensor]:
        return [state, state]

    metric = Reliability(distributed_available_fn=lambda: True, dist_sync_fn=gather)
    metric.update_scores(torch.tensor([1.0, 0.0]))
    assert metric.count() == 4
    metric.sync(dist_sync_fn=gather)
    assert metric.interval() == wilson_interval(0.5, 4)
    metric.unsync()
    assert metric.metric_state["reliability_teacher_forced_n"] == 2


def test_plot(metric: EditMetric) -> None:
    metric.update_scores(torch.tensor([1.0, 0.0]))
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    figure, axes = metric.plot()
    assert axes.get_ylim()[1] >= 1
    assert next(iter(axes.lines)).get_ydata()[0] == 0.5
    matplotlib.pyplot.close(figure)


def test_plot_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_edit.metrics.base.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"lightning-edit\[plot\]"):
        Reliability().plot()
