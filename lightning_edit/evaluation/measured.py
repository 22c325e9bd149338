# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What requests are measured at before and after edits, over all processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed

from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.request import EditRequest
from lightning_edit.evaluation.evaluator import Evaluation, ScoredProbe, probe_scores
from lightning_edit.functional.counterfact import edit_score
from lightning_edit.metrics import edit_metrics
from lightning_edit.metrics.reading import Reading

__all__ = ["Measured", "gathered", "metric_values"]


@dataclass
class Measured:
    """Requests, and the scores of their probes before and after edits.

    Args:
        requests: In the order of ``before`` and ``after``.
        before: Scores without the edits.
        after: Scores with them.
        figures: What the edits tell of themselves, a row a request.
        between: Within a case of several edits, made one after another: how many of them were in
            the model, and the scores of a probe of those without and with them.
    """

    requests: list[EditRequest] = field(default_factory=list)
    before: list[ScoredProbe] = field(default_factory=list)
    after: list[ScoredProbe] = field(default_factory=list)
    figures: list[RequestFigures] = field(default_factory=list)
    between: list[tuple[int, ScoredProbe, ScoredProbe]] = field(default_factory=list)

    def add(
        self,
        requests: Sequence[EditRequest],
        before: Evaluation,
        after: Evaluation,
        figures: Iterable[RequestFigures] = (),
    ) -> None:
        """Adds requests that were measured."""
        self.requests += requests
        self.before += before.probes
        self.after += after.probes
        self.figures += figures

    def whole(self) -> Measured:
        """That of all processes, to be asked for by each."""
        mine = (self.requests, self.before, self.after, self.figures, self.between)
        return Measured(*(gathered(part) for part in mine))


def gathered(rows: list[Any]) -> list[Any]:
    """The rows of all processes, those of the first one first."""
    if not torch.distributed.is_initialized():
        return rows
    parts: list[list[Any]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def metric_values(
    evaluation: Evaluation, readings: Sequence[Reading]
) -> dict[str, tuple[float, int]]:
    """Value and number of rows of each metric that has rows, KL and CounterFact's score included.

    Args:
        evaluation: The probes of all processes.
        readings: Readings that were taken.
    """
    values: dict[str, tuple[float, int]] = {}
    for key in map(str, edit_metrics(readings=readings, likelihoods=True)):
        known = probe_scores(evaluation.probes, key)
        if known:
            values[key] = (math.fsum(known) / len(known), len(known))
    parts = [
        values.get(f"{name}/teacher_forced", (float("nan"), 0))
        for name in ("efficacy_success", "paraphrase_success", "neighborhood_success")
    ]
    if all(n for _, n in parts):
        score = edit_score(*(value for value, _ in parts))
        values["edit_score/teacher_forced"] = (score, parts[0][1])
    mean, n = evaluation.mean("locality/kl")
    if n:
        values["locality/kl"] = (mean, n)
    return values
