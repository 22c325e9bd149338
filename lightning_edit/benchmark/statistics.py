# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""From rows of probes to figures of methods, with intervals and paired differences."""

# Shapes: B resamples, R requests, K columns, each a method's metric in one reading.

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_edit.benchmark.conflicts import conflict_figures
from lightning_edit.benchmark.figure import RESAMPLES, Figure
from lightning_edit.benchmark.specs import UNEDITED
from lightning_edit.benchmark.store import CellRecord
from lightning_edit.functional.bootstrap import (
    cluster_means,
    cluster_weights,
    percentile_interval,
    sign_flip_p,
)
from lightning_edit.functional.intervals import wilson_interval

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RATES", "READINGS", "figures", "frame_of"]

RATES = ("reliability", "generality", "locality", "portability")
READINGS = ("teacher_forced", "autoregressive")
FLIPS = 10000


class _Column(NamedTuple):
    method: str
    metric: str
    kind: str
    reading: str


def frame_of(found: Sequence[Figure]) -> pd.DataFrame:
    """Figures as a frame, a column for each of their fields."""
    import pandas as pd

    names = list(Figure.__dataclass_fields__)
    return pd.DataFrame([asdict(figure) for figure in found], columns=names)


def figures(
    rows: pd.DataFrame,
    labels: Mapping[str, tuple[str, str, str]],
    records: Mapping[str, CellRecord],
    reference: str,
) -> list[Figure]:
    """All figures of a study, as far as its cells are done.

    Args:
        rows: Rows of probes of its cells.
        labels: Key of each cell to the labels of its data set, protocol and method, in the order of
            the tables.
        records: What the cells came to.
        reference: Label of the method that the others are compared with.
    """
    found: list[Figure] = []
    rows = rows.assign(
        **{
            name: rows["cell"].map({key: label[i] for key, label in labels.items()})
            for i, name in enumerate(("data", "protocol", "method"))
        }
    )
    for data, protocol in dict.fromkeys(label[:2] for label in labels.values()):
        part = rows[(rows["data"] == data) & (rows["protocol"] == protocol)]
        methods = [label[2] for label in labels.values() if label[:2] == (data, protocol)]
        points = [(part[part["is_final"]], True)]
        curve = part[~part["is_final"]]
        points += [(curve[curve["edits"] == edits], False) for edits in sorted(set(curve["edits"]))]
        for point, is_final in points:
            if len(point):
                place = (data, protocol, int(point["edits"].max()), is_final)
                found += _rates(point, place, list(dict.fromkeys(methods)), reference)
        for method in dict.fromkeys(methods):
            keys = [key for key, label in labels.items() if label == (data, protocol, method)]
            done = [records[k] for k in keys if records.get(k, {}).get("status") == "done"]
            own = part[part["is_final"] & (part["method"] == method)]
            if done:
                whole = Figure(data, protocol, method, int(own["edits"].max()), True, "")
                found += conflict_figures(part[part["method"] == method], whole)
                found += _costs(own, done, whole)
    return found


def _rates(
    rows: pd.DataFrame,
    place: tuple[str, str, int, bool],
    methods: Sequence[str],
    reference: str,
) -> Iterator[Figure]:
    data, protocol, edits, is_final = place
    ids, columns, sums_RK, counts_RK, before_K = _by_request(rows, [UNEDITED, *methods])
    ones_1R = torch.ones(1, len(ids), dtype=torch.float64)
    weights_BR = cluster_weights(len(ids), RESAMPLES)
    means_K = cluster_means(sums_RK, counts_RK, ones_1R)[0]
    low_K, high_K = _intervals(sums_RK, counts_RK, means_K, weights_BR)
    places = {column: k for k, column in enumerate(columns)}
    against = [places.get(column._replace(method=reference), -1) for column in columns]
    differences = _differences(sums_RK, counts_RK, against, weights_BR)
    for k, column in enumerate(columns):
        other = [places.get(column._replace(reading=reading), -1) for reading in READINGS]
        gap = float(means_K[other[0]] - means_K[other[1]]) if min(other) >= 0 else math.nan
        is_compared = against[k] >= 0 and column.method != reference
        yield Figure(
            data,
            protocol,
            column.method,
            0 if column.method == UNEDITED else edits,
            is_final,
            column.metric,
            column.kind,
            column.reading,
            float(before_K[k]),
            float(means_K[k]),
            float(low_K[k]),
            float(high_K[k]),
            gap,
            int(counts_RK[:, k].sum()),
            int((counts_RK[:, k] > 0).sum()),
            *((reference, *differences[k].tolist()) if is_compared else ()),
        )


def _by_request(
    rows: pd.DataFrame, methods: Sequence[str]
) -> tuple[list[str], list[_Column], Tensor, Tensor, Tensor]:
    """Sums and counts of scores by request, [R, K], and what the unedited model's mean is, [K]."""
    import pandas as pd

    columns = ["cell", "method", "metric", "kind", "request_id", "probe"]
    parts = []
    for reading in READINGS:
        part = rows[[*columns, reading, f"{reading}_before"]].copy()
        part.columns = [*columns, "value", "before"]
        parts.append(part.assign(reading=reading))
    long = pd.concat(parts).dropna(subset=["value", "before"])
    long = long.astype({"value": "float64", "before": "float64"})
    # Wordings of one question: it counts once, by the one that does best.
    is_worded = long["kind"] == "multi_hop"
    if is_worded.any():
        one = [name for name in long.columns if name not in ("probe", "value", "before")]
        worded = long[is_worded].groupby(one, sort=False, as_index=False)
        best = worded.agg({"probe": "min", "value": "max", "before": "max"})
        long = pd.concat([long[~is_worded], best])
    # The unedited model is asked the same, once.
    own = long.drop_duplicates(["metric", "request_id", "probe", "reading"])
    long = pd.concat([own.assign(method=UNEDITED, value=own["before"]), long])
    # Probes of any kind count in the whole, and by themselves where there are kinds.
    long = pd.concat([long.assign(kind=""), long[long["kind"] != ""]])
    names = list(_Column._fields)
    grouped = long.groupby([*names, "request_id"], sort=False)
    sums = grouped["value"].sum().unstack("request_id")
    counts = grouped["value"].count().unstack("request_id")
    before = long.groupby(names, sort=False)["before"].mean()
    ids = sorted(map(str, sums.columns))
    found = sorted(
        (_Column(*index) for index in sums.index),
        key=lambda c: (
            list(methods).index(c.method),
            RATES.index(c.metric),
            c.kind,
            READINGS.index(c.reading),
        ),
    )
    arrays = [
        torch.tensor(table.loc[found, ids].fillna(0.0).to_numpy(dtype="float64")).T
        for table in (sums, counts)
    ]
    return ids, found, arrays[0], arrays[1], torch.tensor(before.loc[found].to_numpy())


def _intervals(
    sums_RK: Tensor, counts_RK: Tensor, means_K: Tensor, weights_BR: Tensor
) -> tuple[Tensor, Tensor]:
    """95 % intervals, [K] each: over requests by bootstrap, and Wilson's where that has no width.

    Where each request has one probe there is nothing to resample that Wilson's does not know; where
    all requests score alike, the bootstrap would be sure of it after however few.
    """
    low_K, high_K = percentile_interval(cluster_means(sums_RK, counts_RK, weights_BR))
    for k in range(len(means_K)):
        has_one = bool(counts_RK[:, k].max() <= 1)
        if has_one or bool(high_K[k] - low_K[k] < 1e-12):
            requests = int((counts_RK[:, k] > 0).sum())
            mean = min(1.0, max(0.0, float(means_K[k])))  # rounded sums may pass the ends
            low_K[k], high_K[k] = wilson_interval(mean, requests)
    return low_K, high_K


def _differences(
    sums_RK: Tensor, counts_RK: Tensor, against: Sequence[int], weights_BR: Tensor
) -> Tensor:
    """Difference from the reference, its interval and its p, [K, 4]; nan where there is none."""
    index_K = torch.tensor(against).clamp_min(0)
    both_RK = (counts_RK > 0) & (counts_RK[:, index_K] > 0)
    own = (sums_RK * both_RK, counts_RK * both_RK)
    other = (sums_RK[:, index_K] * both_RK, counts_RK[:, index_K] * both_RK)
    samples_BK = cluster_means(*own, weights_BR) - cluster_means(*other, weights_BR)
    low_K, high_K = percentile_interval(samples_BK)
    parts_RK = own[0] / own[1].sum(0) - other[0] / other[1].sum(0)
    p_K = sign_flip_p(parts_RK.nan_to_num(), FLIPS)
    found_K4 = torch.stack([parts_RK.sum(0), low_K, high_K, p_K], 1)
    found_K4[torch.tensor(against) < 0] = math.nan
    return found_K4


def _costs(rows: pd.DataFrame, records: Sequence[CellRecord], place: Figure) -> Iterator[Figure]:
    from dataclasses import replace

    edits = rows.drop_duplicates(["cell", "request_id"])
    seconds = edits["seconds"].dropna()
    if len(seconds):
        median, count = float(seconds.median()), len(seconds)
        yield replace(place, metric="seconds", value=median, n=count, requests=count)
    peaks = [p for r in records if (p := r.get("peak_memory_bytes")) is not None]
    if peaks:
        yield replace(place, metric="peak_memory_bytes", value=float(max(peaks)), n=len(peaks))
    ratios = [x for r in records if (x := r.get("perplexity_ratio")) is not None]
    if ratios:
        mean = math.fsum(ratios) / len(ratios)
        yield replace(place, metric="perplexity_ratio", value=mean, n=len(ratios))
    failed = sum(record.get("failed", 0) for record in records)
    requests = sum(record.get("requests", 0) for record in records)
    yield replace(place, metric="failed", value=float(failed), n=requests)
