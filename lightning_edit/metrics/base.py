# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Bases of the metrics: exact rates that neither precision plugins nor batching can bend.

Scores are summed as integers, in units of 2**-32. So half-precision modules cannot round the sums
(a bfloat16 counter stops at 256), and any split into batches or processes gives the same rate.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_edit.core.arguments import CheckedArguments
from lightning_edit.core.errors import MissingDependencyError
from lightning_edit.functional.intervals import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CountingMetric", "EditMetric"]

_ONE = 2**32


class CountingMetric(CheckedArguments, Metric):
    """Means of scores in [0, 1], each kept as an integer sum and an integer number of rows.

    Subclasses call ``add_counter`` in their constructor, ``count_scores`` in ``update`` and
    ``rate`` in ``compute``. They never add states of another kind.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def add_counter(self, name: str) -> None:
        """Adds the states ``<name>_sum`` and ``<name>_n``, both summed over processes.

        Args:
            name: Not used by another metric of the same collection, for torchmetrics shares the
                states of metrics whose states look alike.
        """
        for part in ("sum", "n"):
            self.add_state(
                f"{name}_{part}", torch.tensor(0, dtype=torch.long), dist_reduce_fx="sum"
            )

    def count_scores(self, name: str, scores: Tensor) -> None:
        """Adds rows to a counter.

        Args:
            name: Name of the counter.
            scores: One score in [0, 1] a row, shape [B].

        Raises:
            ValueError: If the scores are not one-dimensional or not all in [0, 1].
        """
        scores = scores.detach().to(self.device)
        if scores.ndim != 1:
            raise ValueError(
                f"{type(self).__name__}: scores are expected to have the shape [B], one for each "
                f"row, but got {tuple(scores.shape)}."
            )
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if not bool(((scores >= 0) & (scores <= 1)).all()):
            raise ValueError(
                f"{type(self).__name__}: scores are expected to lie in [0, 1], but got "
                f"{scores.tolist()}."
            )
        # Scaling by a power of two is exact, so zeros, ones and halves stay what they are.
        units = (scores * _ONE).round().long()
        setattr(self, f"{name}_sum", getattr(self, f"{name}_sum") + units.sum())
        setattr(self, f"{name}_n", getattr(self, f"{name}_n") + scores.numel())

    def rate(self, name: str) -> tuple[float, int]:
        """The mean score and the number of rows of a counter; the mean of no rows is nan."""
        n = int(getattr(self, f"{name}_n"))
        return (int(getattr(self, f"{name}_sum")) / (_ONE * n) if n else math.nan), n

    def as_tensor(self, value: float) -> Tensor:
        """A result on the metric's device, in float64 wherever the device knows it."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.tensor(value, dtype=dtype, device=self.device)

    def merge_state(self, incoming_state: dict[str, list[Tensor] | Tensor] | Metric) -> None:
        """Adds the counts of another metric of the same kind, for instance of another run.

        Args:
            incoming_state: The other metric, or its ``metric_state``.
        """
        super().merge_state(incoming_state)
        self._computed = None  # torchmetrics 1.9 would go on returning the value before the merge

    def set_dtype(self, dst_type: str | torch.dtype) -> Self:
        """Returns the metric as it is: counts stay integers."""
        return self

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> Any:
        """Plots the metric's value, or several values of it.

        Args:
            val: A result of ``compute`` or ``forward``, or a list of them; computed if left out.
            ax: Matplotlib axes to draw on; made if left out.

        Returns:
            Figure and axes.

        Raises:
            MissingDependencyError: If matplotlib is not installed.
        """
        if find_spec("matplotlib") is None:
            raise MissingDependencyError("matplotlib", "plot", "Plotting a metric")
        return self._plot(val, ax)

    def _wrap_compute(self, compute: Callable[..., object]) -> Callable[..., object]:
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def quiet(*args: object, **kwargs: object) -> object:
            # No rows is a result (nan) and not an accident: a run without portability probes.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*was called before the ``update`` method")
                return wrapped(*args, **kwargs)

        return quiet


class EditMetric(CountingMetric):
    """A rate over rows, with its number of rows and its interval.

    Subclasses implement ``update`` and hand their scores per row to ``count_scores`` under
    ``state``; they never override ``compute``, ``update_scores``, ``count`` or ``interval``.

    Args:
        key: Name in collections and reports: words joined by slashes.
        kwargs: Arguments of every torchmetrics metric.
    """

    def __init__(self, key: str, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.key = key
        self.state = key.replace("/", "_")
        self.add_counter(self.state)

    def update_scores(self, scores: Tensor) -> None:
        """Adds rows whose scores the caller has already worked out.

        Args:
            scores: One score in [0, 1] a row, shape [B].

        Raises:
            ValueError: If the scores are not one-dimensional or not all in [0, 1].
        """
        # What torchmetrics does around every `update`.
        self._computed = None
        self._update_count += 1
        self.count_scores(self.state, scores)

    def compute(self) -> Tensor:
        """The mean score of all rows, in [0, 1]; nan without rows."""
        return self.as_tensor(self.rate(self.state)[0])

    def count(self) -> int:
        """Number of rows over all processes. To be called on every process."""
        return self._synced_rate()[1]

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson interval of the rate over all processes. To be called on every process.

        Args:
            level: Coverage, between 0 and 1.

        Returns:
            Lower and upper end; nan without rows. Conservative where scores lie between 0 and 1.
        """
        return wilson_interval(*self._synced_rate(), level=level)

    def _synced_rate(self) -> tuple[float, int]:
        by_hand = self._is_synced  # the caller has synced, and will undo it
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn,
            should_sync=self._to_sync and not by_hand,
            should_unsync=not by_hand,
        ):
            return self.rate(self.state)
