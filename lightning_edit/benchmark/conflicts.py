# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Of pairs of edits that contradict each other: which fact is likelier, and what was lost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_edit.benchmark.figure import RESAMPLES, Figure
from lightning_edit.functional.bootstrap import (
    cluster_means,
    cluster_weights,
    percentile_interval,
)
from lightning_edit.functional.conflict import (
    conflict_magnitude,
    ignore_rate,
    knowledge_distortion,
)
from lightning_edit.functional.counterfact import efficacy_success
from lightning_edit.functional.intervals import wilson_interval

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CONFLICTS", "conflict_figures"]

#: Metrics of pairs of edits (arXiv 2310.02129), and whether each pair scores 0 or 1.
CONFLICTS = {
    "conflict_score": True,
    "conflict_magnitude": False,
    "distortion": False,
    "ignore_rate": False,
    "failure_rate": True,
}


def conflict_figures(rows: pd.DataFrame, place: Figure) -> Iterator[Figure]:
    """Figures of one method, as far as its requests are such pairs.

    Args:
        rows: Its probes, those between two edits of a case included.
        place: Where the figures belong.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for _, cell in rows.groupby("cell", sort=False):
        for metric, request_id, value in _scores(cell):
            found.setdefault(metric, {}).setdefault(request_id, []).append(value)
    for metric, is_rate in CONFLICTS.items():
        by_request = list(found.get(metric, {}).values())
        if by_request:
            values = torch.tensor([math.fsum(v) / len(v) for v in by_request]).double()
            low, high = _interval(values, is_rate=is_rate)
            count = sum(map(len, by_request))
            yield replace(
                place,
                metric=metric,
                value=float(values.mean()),
                low=low,
                high=high,
                n=count,
                requests=len(by_request),
            )


def _scores(cell: pd.DataFrame) -> Iterator[tuple[str, str, float]]:
    """Metric, id of the second request and score of each pair of a cell."""
    said = cell[(cell["metric"] == "reliability") & cell["nll_new"].notna()]
    at_end = {row.position: row for row in said[said["is_final"]].itertuples()}
    alone = {row.position: row for row in said[~said["is_final"]].itertuples()}
    final = cell[cell["is_final"]]
    follows = final[(final["kind"] == "conflict") & final["nll_new"].notna()]
    for probe in follows.itertuples():
        first = at_end.get(probe.position - 1)  # the other edit of the case
        if first is None:
            continue
        is_later = efficacy_success(_tensor([probe.nll_new]), _tensor([first.nll_new]))
        yield "conflict_score", probe.request_id, float(is_later)
        if first.position in alone:
            before = _tensor([alone[first.position].nll_new])
            magnitude = conflict_magnitude(before, _tensor([first.nll_new]))
            yield "conflict_magnitude", probe.request_id, float(magnitude)
    others = final[(final["kind"] == "neighborhood") & final["nll_old"].notna()]
    for position, row in at_end.items():
        first = alone.get(position - 1)
        if first is None or first.prompt != row.prompt:
            continue
        own = others[(others["request_id"] == row.request_id) & (others["prompt"] == row.prompt)]
        if len(own):
            before, after = _tensor(own["nll_old_before"]), _tensor(own["nll_old"])
            whole = [
                torch.cat([_tensor([x]), part])
                for x, part in ((row.nll_new_before, before), (row.nll_new, after))
            ]
            yield "distortion", row.request_id, float(knowledge_distortion(*whole))
            rate = float(ignore_rate(before, after))
            yield "ignore_rate", row.request_id, rate
            yield "failure_rate", row.request_id, float(rate > 0.5)


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def _interval(values: Tensor, *, is_rate: bool) -> tuple[float, float]:
    if is_rate:
        return wilson_interval(float(values.mean()), len(values))
    weights_BR = cluster_weights(len(values), RESAMPLES)
    means_B1 = cluster_means(values[:, None], torch.ones_like(values)[:, None], weights_BR)
    low, high = percentile_interval(means_B1)
    return float(low[0]), float(high[0])
