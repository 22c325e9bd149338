# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Metrics of edits as torchmetrics objects, to be logged and reduced over processes."""

from lightning_edit.metrics.base import CountingMetric, EditMetric
from lightning_edit.metrics.collection import edit_metrics
from lightning_edit.metrics.counterfact import (
    EditScore,
    EfficacySuccess,
    NeighborhoodSuccess,
    ParaphraseSuccess,
)
from lightning_edit.metrics.fluency import Fluency
from lightning_edit.metrics.generality import Generality
from lightning_edit.metrics.locality import Locality
from lightning_edit.metrics.portability import Portability
from lightning_edit.metrics.reading import Reading, ReadingMetric
from lightning_edit.metrics.reliability import Reliability
from lightning_edit.metrics.routing_similarity import RoutingSimilarity

__all__ = [
    "CountingMetric",
    "EditMetric",
    "EditScore",
    "EfficacySuccess",
    "Fluency",
    "Generality",
    "Locality",
    "NeighborhoodSuccess",
    "ParaphraseSuccess",
    "Portability",
    "Reading",
    "ReadingMetric",
    "Reliability",
    "RoutingSimilarity",
    "edit_metrics",
]
