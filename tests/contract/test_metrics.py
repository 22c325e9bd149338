# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What every metric keeps to, found by enumeration."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
import torch
from torchmetrics import Metric

import lightning_edit.metrics
from lightning_edit.metrics import EditMetric, edit_metrics
from tests.contract.enumeration import arguments_of, documented_arguments

METRICS: dict[str, Any] = {
    name: value
    for name in lightning_edit.metrics.__all__
    if inspect.isclass(value := getattr(lightning_edit.metrics, name))
    and issubclass(value, Metric)
    and name not in ("CountingMetric", "EditMetric", "ReadingMetric")  # bases
}


@pytest.fixture(params=METRICS)
def cls(request: pytest.FixtureRequest) -> Any:
    return METRICS[request.param]


def test_says_how_it_is_to_be_read(cls: Any) -> None:
    assert (cls.full_state_update, cls.is_differentiable, cls.higher_is_better) == (
        False,
        False,
        True,
    )
    assert (cls.plot_lower_bound, cls.plot_upper_bound) == (0.0, 1.0)
    assert ">>> " in cls.__doc__
    described = {name for owner in cls.__mro__ for name in documented_arguments(owner)}
    own = {
        name for name, owner in arguments_of(cls).items() if owner.__module__ != Metric.__module__
    }
    assert own <= described


def test_states_are_integers_that_processes_add_up(cls: Any) -> None:
    metric = cls()
    assert metric._defaults
    for name, default in metric._defaults.items():
        assert default.dtype == torch.long
        assert metric._reductions[name] is torch.sum or "sum" in str(metric._reductions[name])
    with pytest.raises(ValueError, match="Unexpected keyword arguments"):
        cls(no_such_argument=1)


def test_half_precision_modules_leave_it_alone(cls: Any) -> None:
    metrics = [cls(), cls(), cls()]
    metrics[0].to(torch.bfloat16)
    metrics[1].half()
    torch.nn.ModuleList(metrics[2:]).half()
    for metric in metrics:
        assert all(getattr(metric, name).dtype == torch.long for name in metric._defaults)


def test_copies_and_resets(cls: Any) -> None:
    metric = cls()
    for state in metric._defaults:
        setattr(metric, state, torch.tensor(2**32, dtype=torch.long))
    twin = pickle.loads(pickle.dumps(metric))  # noqa: S301 (our own bytes)
    for other in (twin, metric.clone()):
        for state in metric._defaults:
            assert torch.equal(getattr(other, state), getattr(metric, state))
        other.reset()
        assert all(not getattr(other, state).any() for state in metric._defaults)
    assert all(getattr(metric, state).any() for state in metric._defaults)


def test_plots(cls: Any) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    figure, axes = cls().plot([torch.tensor(0.25), torch.tensor(0.75)])
    assert axes.get_ylim()[0] <= 0.0
    matplotlib.pyplot.close(figure)


def test_no_two_metrics_of_a_run_share_the_name_of_a_state() -> None:
    states = [
        name for metric in edit_metrics(likelihoods=True).values() for name in metric._defaults
    ]
    assert len(states) == len(set(states)) > 20
    alone = [name for cls in METRICS.values() for name in cls()._defaults]
    assert len(alone) == len(set(alone))
    assert all(
        issubclass(cls, EditMetric) or cls.__name__ == "EditScore" for cls in METRICS.values()
    )
