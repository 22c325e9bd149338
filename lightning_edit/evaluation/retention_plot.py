# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The picture of a sequence of edits: who still holds, and what it cost."""

# Shapes: S measurements, K edits.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_edit.core.errors import MissingDependencyError
from lightning_edit.functional.retention import average_retention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_retention"]


def plot_retention(
    retention_SK: Tensor,
    steps: Sequence[int],
    perplexity: Sequence[float],
    perplexity_before: float,
) -> Figure:
    """Draws the retention matrix, and below it the share of edits held and the perplexity.

    Args:
        retention_SK: R(t, k), [S, K]; nan where edit k was not yet made.
        steps: Number of edits made at each row, S of them.
        perplexity: Perplexity on held-out prose at each row.
        perplexity_before: That of the unedited model.

    Returns:
        A matplotlib figure; ``figure.savefig("retention.png")`` writes it.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
        ValueError: If shapes and steps do not fit.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise MissingDependencyError("matplotlib", "plot", "Drawing a retention curve") from None

    average = average_retention(retention_SK, steps)
    figure = Figure(figsize=(7, 7), layout="constrained", dpi=120)
    matrix, curve = figure.subplots(2, 1, height_ratios=[3, 2])

    edges = [0, *steps]  # a row stands for the edits since the one before
    rows = [edit + 0.5 for edit in range(retention_SK.shape[1] + 1)]
    matrix.pcolormesh(edges, rows, retention_SK.T.numpy(), cmap="Blues", vmin=0, vmax=1.2)
    matrix.set_facecolor("0.9")  # not yet made
    matrix.invert_yaxis()
    matrix.set_ylabel("edit")
    matrix.set_title("Which edits hold (dark), after so many edits", fontsize=11)

    curve.plot(steps, average.numpy(), color="tab:blue", marker="o", markersize=3)
    curve.set_ylim(0, 1.05)
    curve.set_xlim(matrix.get_xlim())
    for axis in (matrix.xaxis, matrix.yaxis, curve.xaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    curve.set_xlabel("edits made")
    curve.set_ylabel("share that holds", color="tab:blue")
    cost = curve.twinx()
    shown = [value if math.isfinite(value) else math.nan for value in perplexity]
    cost.plot([0, *steps], [perplexity_before, *shown], color="tab:orange", linestyle="--")
    known = [value for value in (perplexity_before, *shown) if math.isfinite(value)]
    if known and max(known) > 10 * min(known):
        cost.set_yscale("log")
    cost.set_ylabel("perplexity on prose", color="tab:orange")
    return figure
