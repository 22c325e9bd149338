# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The metrics of knowledge editing, before and after any fit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_edit.callbacks.model_access import (
    find_requests,
    model_and_tokens,
    unedited,
)
from lightning_edit.core.arguments import CheckedArguments
from lightning_edit.core.request import EditRequest, check_requests
from lightning_edit.evaluation.evaluator import Baseline, Evaluation, Evaluator, ScoredProbe
from lightning_edit.evaluation.measured import gathered, metric_values
from lightning_edit.functional.intervals import wilson_interval
from lightning_edit.metrics.reading import Reading
from lightning_edit.modules.base import EditModule
from lightning_edit.report.results import MetricRow

__all__ = ["EditEvaluator", "metric_rows"]


class EditEvaluator(CheckedArguments, Callback):
    """Measures reliability, generality, locality and portability before and after ``fit``.

    Works with an editor, whose unedited weights it knows at any time, and with any
    LightningModule that holds a Hugging Face model, whose weights at the start of ``fit`` are the
    unedited ones. Under several processes each asks its share of the requests. A resumed run of
    such a module has no ``locality/kl``: whole distributions are too large for a checkpoint.

    Values go to the loggers and to ``trainer.callback_metrics`` as ``edit/<metric>/<reading>``,
    such as ``edit/reliability/teacher_forced``: those of ``every_n_steps`` along the run, where
    ``ModelCheckpoint`` and ``EarlyStopping`` may watch them, and all of them at its end.

    Args:
        requests: What to measure by; the requests of the Trainer's datamodule when None.
        readings: Readings to take.
        max_new_tokens: Longest continuation that is read, in tokens.
        every_n_steps: Also measure under teacher forcing after every so many optimizer steps: the
            requests so far, as a curve over the number of edits; all requests, over the number
            of steps, in a training. Never when None.
        model_attribute: Attribute of the LightningModule that holds the model; found by its type
            when None.

    Examples:
        >>> EditEvaluator(readings=["teacher_forced"]).rows
        {}
    """

    def __init__(
        self,
        requests: list[EditRequest] | None = None,
        readings: Sequence[Reading] = ("teacher_forced", "autoregressive"),
        max_new_tokens: int = 24,
        every_n_steps: int | None = None,
        model_attribute: str | None = None,
    ) -> None:
        if requests is not None:
            check_requests(requests)
        self.given = requests
        self.readings: tuple[Reading, ...] = tuple(readings)
        self.max_new_tokens = max_new_tokens
        self.every_n_steps = every_n_steps
        self.model_attribute = model_attribute
        #: The requests in order.
        self.requests: list[EditRequest] = []
        #: Scores of all probes of all requests.
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None
        #: Metric key to values before and after.
        self.rows: dict[str, MetricRow] = {}
        #: Points of the curve over the sequence.
        self.sequence: list[dict[str, float]] = []
        #: Seconds spent on measuring.
        self.seconds = 0.0
        self._baseline = Baseline({})
        self._values_before: dict[str, tuple[float, int]] = {}
        self._restored: Mapping[str, Any] | None = None
        self._seen_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After checkpoints are restored: measures the unedited model."""
        self.requests = find_requests(trainer, self.given, "EditEvaluator")
        self.after, self.rows, self.seconds = None, {}, 0.0
        self._seen_step = trainer.global_step
        restored, self._restored = self._restored, None
        self.sequence = list(restored["sequence"]) if restored else []
        began = time.perf_counter()
        if restored is not None and not isinstance(pl_module, EditModule):
            # The model is trained already; what it was is in the checkpoint.
            ids = {prompt: tuple(row) for prompt, row in restored["ids"].items()}
            self._baseline = Baseline(restored["texts"], ids)
            self.before = Evaluation([ScoredProbe(**row) for row in restored["before"]])
            self._values_before = {k: (v, n) for k, (v, n) in restored["values"].items()}
            return
        evaluator = self._evaluator(pl_module)
        share = self._share(self.requests)
        with unedited(pl_module):
            mine = evaluator.evaluate(share)
        self._baseline = mine.baseline
        self.before = self._gather(mine)
        self._values_before = metric_values(self.before, self.readings)
        self.seconds += time.perf_counter() - began

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object, **kwargs: object
    ) -> None:
        """After every ``every_n_steps`` steps: adds a point to the curve."""
        step = trainer.global_step
        # Batches whose gradients are accumulated end without a step.
        if not self.every_n_steps or step == self._seen_step or step % self.every_n_steps:
            return
        self._seen_step = step
        began = time.perf_counter()
        point, requests = {"step": float(step)}, self.requests
        if isinstance(pl_module, EditModule) and not pl_module.automatic_optimization:
            done = len(pl_module.history)  # failed ones included
            point, requests = {"edits": float(done)}, requests[:done]
        evaluator = Evaluator(
            *model_and_tokens(pl_module, self.model_attribute, "EditEvaluator"),
            readings=["teacher_forced"],
        )
        share = self._share(requests)
        mine = evaluator.evaluate(share, self._baseline)
        values = metric_values(self._gather(mine), ["teacher_forced"])
        found = {key: value for key, (value, _) in values.items()}
        self.sequence.append({**point, **found})
        for name, value in _log(trainer, found).items():
            pl_module.log(name, value, logger=False, batch_size=1)
        _ = trainer.callback_metrics  # keeps them until whoever watches them looks
        self.seconds += time.perf_counter() - began

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last step: measures the edited model."""
        self.finish(pl_module)

    def finish(self, pl_module: LightningModule) -> None:
        """Measures the edited model, once."""
        if self.after is not None:
            return
        began = time.perf_counter()
        evaluator = self._evaluator(pl_module)
        mine = evaluator.evaluate(self._share(self.requests), self._baseline)
        self.after = self._gather(mine)
        after = metric_values(self.after, self.readings)
        self.rows = metric_rows(self._values_before, after)
        trainer = pl_module.trainer
        final = _log(trainer, {key: value for key, (value, _) in after.items()})
        trainer.callback_metrics.update({k: torch.tensor(value) for k, value in final.items()})
        self.seconds += time.perf_counter() - began

    @override
    def state_dict(self) -> dict[str, object]:
        if self.before is None:
            return {}
        return {
            "before": [asdict(probe) for probe in self.before.probes],
            "texts": dict(self._baseline.texts),
            "ids": {prompt: list(ids) for prompt, ids in self._baseline.ids.items()},
            "values": {key: list(value) for key, value in self._values_before.items()},
            "sequence": self.sequence,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

    def _evaluator(self, pl_module: LightningModule) -> Evaluator:
        model, tokens = model_and_tokens(pl_module, self.model_attribute, "EditEvaluator")
        return Evaluator(model, tokens, readings=self.readings, max_new_tokens=self.max_new_tokens)

    def _share(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        return list(requests[_rank() :: _world_size()])

    def _gather(self, mine: Evaluation) -> Evaluation:
        """The probes of all processes, in the order of the requests."""
        order = {request.id: i for i, request in enumerate(self.requests)}
        return Evaluation(sorted(gathered(mine.probes), key=lambda p: order[p.request_id]))


def metric_rows(
    before: Mapping[str, tuple[float, int]], after: Mapping[str, tuple[float, int]]
) -> dict[str, MetricRow]:
    """Metric key to values before and after, with the interval of a rate.

    Args:
        before: Metric key to value and number of rows.
        after: The same.
    """
    rows: dict[str, MetricRow] = {}
    for key, (value, n) in after.items():
        is_rate = key != "locality/kl" and not key.startswith("edit_score")
        interval = wilson_interval(value, n) if is_rate and n else None
        rows[key] = MetricRow(before.get(key, (float("nan"), 0))[0], value, n, interval)
    return rows


def _log(trainer: Trainer, values: Mapping[str, float]) -> dict[str, float]:
    """Gives values to the loggers at once, and returns them by the names that they have there."""
    named = {f"edit/{key}": value for key, value in values.items()}
    for logger in trainer.loggers:
        logger.log_metrics(named, step=trainer.global_step)
    return named


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
