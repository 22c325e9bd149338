# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""One figure of a comparison: a row of the frame that ``compare`` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["RESAMPLES", "Figure"]

RESAMPLES = 2000


@dataclass(frozen=True)
class Figure:
    """One figure of one method: a row of the frame that ``compare`` returns.

    Args:
        data: Label of the data set.
        protocol: Label of the protocol.
        method: Label of the method; ``unedited`` for the model as it is.
        edits: Edits in the model when it was measured, at most.
        is_final: Whether these were all; else it is a point of the curve of a sequence.
        metric: ``reliability``, ``generality``, ``locality``, ``portability``, ``conflict_score``
            and its like, or a cost.
        kind: Kind of the probes, where only those of one kind are meant.
        reading: ``teacher_forced`` or ``autoregressive``; empty for conflicts and costs.
        before: Mean over the same probes of the unedited model.
        value: Mean over all probes of all requests and seeds; the median of seconds.
        low: Lower end of the 95 % interval of ``value``.
        high: Upper end.
        gap: By how much the teacher-forced value is above the autoregressive one.
        n: Probes, each counted once a seed.
        requests: Requests that have them.
        reference: Method that this one is compared with.
        difference: ``value`` less that of the reference, on the requests that both have.
        difference_low: Lower end of its 95 % interval.
        difference_high: Upper end.
        p: Two-sided, of the difference, by a paired permutation test over requests.
    """

    data: str
    protocol: str
    method: str
    edits: int
    is_final: bool
    metric: str
    kind: str = ""
    reading: str = ""
    before: float = math.nan
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    gap: float = math.nan
    n: int = 0
    requests: int = 0
    reference: str = ""
    difference: float = math.nan
    difference_low: float = math.nan
    difference_high: float = math.nan
    p: float = math.nan
