# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""All metrics of an edit in one collection, under the names that reports use."""

from __future__ import annotations

from collections.abc import Sequence

from torchmetrics import Metric, MetricCollection

from lightning_edit.metrics.counterfact import (
    EfficacySuccess,
    NeighborhoodSuccess,
    ParaphraseSuccess,
)
from lightning_edit.metrics.generality import Generality
from lightning_edit.metrics.locality import Locality
from lightning_edit.metrics.portability import Portability
from lightning_edit.metrics.reading import Reading, ReadingMetric
from lightning_edit.metrics.reliability import Reliability

__all__ = ["edit_metrics"]

KINDS = ("one_hop", "subject_alias", "inverse", "single_hop", "multi_hop", "conflict")


def edit_metrics(
    prefix: str = "",
    readings: Sequence[Reading] = ("teacher_forced", "autoregressive"),
    kinds: Sequence[str] = KINDS,
    *,
    likelihoods: bool = False,
) -> MetricCollection:
    """Reliability, generality, locality and portability in every reading.

    Update its members one by one, for each takes other rows:
    ``metrics["reliability/teacher_forced"].update(...)``.

    Args:
        prefix: Put before every key of the results, such as ``"val/"``.
        readings: Readings to take.
        kinds: Kinds of portability that get a rate of their own beside the common one.
        likelihoods: Also the strict teacher-forced rates and CounterFact's ES, PS and NS, all of
            which come with the teacher-forced reading.

    Returns:
        A collection with the keys ``<metric>/<reading>`` and ``portability/<kind>/<reading>``;
        with ``likelihoods`` also ``<metric>/teacher_forced_strict`` and
        ``efficacy_success/teacher_forced`` and its like.

    Raises:
        ValueError: If a reading is unknown or a kind is not a plain word.

    Examples:
        >>> sorted(edit_metrics(readings=["teacher_forced"], kinds=["one_hop"]))
        ['generality/teacher_forced', 'locality/teacher_forced',
         'portability/one_hop/teacher_forced', 'portability/teacher_forced',
         'reliability/teacher_forced']
    """
    metrics: list[ReadingMetric] = []
    for reading in readings:
        metrics += [
            metric(reading=reading)
            for metric in (Reliability, Generality, Locality, Portability)
            if reading in metric.readings
        ]
        metrics += [Portability(reading=reading, kind=kind) for kind in kinds]
    members: dict[str, Metric | MetricCollection] = {metric.key: metric for metric in metrics}
    if likelihoods and "teacher_forced" in readings:
        for strict in (Reliability, Generality, Locality, Portability):
            metric = strict(strict=True)
            members[metric.key] = metric
        for success in (EfficacySuccess(), ParaphraseSuccess(), NeighborhoodSuccess()):
            members[f"{success.key}/teacher_forced"] = success
    # Computing in groups would share the states of metrics that agree on the first batch.
    return MetricCollection(members, prefix=prefix or None, compute_groups=False)
