# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The metrics of knowledge editing, before and after any fit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_edit.callbacks.model_access import (
    find_requests,
    model_and_tokens,
    unedited,
)
from lightning_edit.core.request import EditRequest, check_requests
from lightning_edit.evaluation.evaluator import Baseline, Evaluation, Evaluator, ScoredProbe
from lightning_edit.functional.counterfact import edit_score
from lightning_edit.functional.intervals import wilson_interval
from lightning_edit.metrics import edit_metrics
from lightning_edit.metrics.reading import Reading
from lightning_edit.modules.base import EditModule
from lightning_edit.report.results import MetricRow

__all__ = ["EditEvaluator"]


class EditEvaluator(Callback):
    """Measures reliability, generality, locality and portability before and after ``fit``.

    Works with an editor, whose unedited weights it knows at any time, and with any
    LightningModule that holds a Hugging Face model, whose weights at the start of ``fit`` are the
    unedited ones. Under several processes each asks its share of the requests. A resumed run of
    such a module has no ``locality/kl``: whole distributions are too large for a checkpoint.

    Args:
        requests: What to measure by; the requests of the Trainer's datamodule when None.
        readings: Readings to take.
        max_new_tokens: Longest continuation that is read, in tokens.
        every_n_steps: Also measure teacher-forced reliability of the requests so far after every
            so many optimizer steps: the curve over a sequence of edits. Never when None.
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

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After checkpoints are restored: measures the unedited model."""
        self.requests = find_requests(trainer, self.given, "EditEvaluator")
        self.after, self.rows, self.seconds = None, {}, 0.0
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
        self._values_before = self._values(mine, pl_module)
        self.before = self._gather(mine)
        self.seconds += time.perf_counter() - began

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object, **kwargs: object
    ) -> None:
        """After every ``every_n_steps`` steps: adds a point to the curve."""
        if not self.every_n_steps or trainer.global_step % self.every_n_steps:
            return
        began = time.perf_counter()
        done = len(self.requests)
        if isinstance(pl_module, EditModule):
            done = len(pl_module.history)  # failed ones included
        evaluator = Evaluator(
            *model_and_tokens(pl_module, self.model_attribute, "EditEvaluator"),
            readings=["teacher_forced"],
        )
        share = self._share(self.requests[:done])
        mine = evaluator.evaluate(share, self._baseline)
        values = self._values(mine, pl_module)
        point = {key: value for key, (value, n) in values.items() if n}
        self.sequence.append({"edits": float(done), **point})
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
        after = self._values(mine, pl_module)
        self.after = self._gather(mine)
        for key, (value, n) in after.items():
            before = self._values_before.get(key, (float("nan"), 0))[0]
            is_rate = key != "locality/kl" and not key.startswith("edit_score")
            self.rows[key] = MetricRow(
                before, value, n, wilson_interval(value, n) if is_rate and n else None
            )
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

    def _values(self, mine: Evaluation, pl_module: LightningModule) -> dict[str, tuple[float, int]]:
        """Value and number of rows of each metric, over all processes."""
        metrics = edit_metrics(readings=self.readings, likelihoods=True).to(pl_module.device)
        mine.update(metrics)
        members: Mapping[str, Any] = dict(metrics.items())
        values = {key: (float(m.compute()), m.count()) for key, m in members.items()}
        values = {key: (value, n) for key, (value, n) in values.items() if n}
        parts = [
            values.get(f"{name}/teacher_forced", (float("nan"), 0))
            for name in ("efficacy_success", "paraphrase_success", "neighborhood_success")
        ]
        if all(n for _, n in parts):
            score = edit_score(*(value for value, _ in parts))
            values["edit_score/teacher_forced"] = (score, parts[0][1])
        mean, n = self._gather(mine).mean("locality/kl")
        if n:
            values["locality/kl"] = (mean, n)
        return values

    def _gather(self, mine: Evaluation) -> Evaluation:
        """The probes of all processes, in the order of the requests."""
        if _world_size() == 1:
            return mine
        parts: list[list[ScoredProbe]] = [[] for _ in range(_world_size())]
        torch.distributed.all_gather_object(parts, mine.probes)
        order = {request.id: i for i, request in enumerate(self.requests)}
        return Evaluation(
            sorted((p for part in parts for p in part), key=lambda p: order[p.request_id])
        )


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
