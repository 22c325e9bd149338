# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Heat maps of causal traces: tokens by layers, as in arXiv 2202.05262, figures 1 and 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_edit.core.errors import MissingDependencyError
from lightning_edit.tracing.causal_tracing import POSITIONS, FactTrace, TracingResult
from lightning_edit.tracing.restoration import Kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

__all__ = ["plot_tracing"]

# Color map of each kind, and its title.
_PANELS: dict[Kind, tuple[str, str]] = {
    "hidden": ("Purples", "one hidden state"),
    "mlp": ("Greens", "MLP outputs, window of {}"),
    "attention": ("Reds", "attention outputs, window of {}"),
}
_INCHES_A_TOKEN = 0.26
_INCHES_AROUND = 1.25


def plot_tracing(result: TracingResult, facts: int = 3) -> Figure:
    """Draws the average over all facts and below it the first facts.

    Rows are tokens, the subject's with a star, and columns the layers at whose states (hidden) or
    around which (MLP, attention) the clean run was restored. Colors are probabilities of the
    answer: for the average what is added to it, for a fact the probability itself, from that with
    the subject corrupted upward.

    Args:
        result: Of at least one fact.
        facts: Facts to draw at most.

    Returns:
        A matplotlib figure; ``figure.savefig("causal_tracing.png")`` writes it.

    Raises:
        EditError: If no fact was traced.
        MissingDependencyError: If matplotlib is not installed.

    References:
        Locating and Editing Factual Associations in GPT, arXiv 2202.05262, section 2.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("matplotlib", "plot", "Drawing causal traces") from None

    averages = {kind: result.average(kind) for kind in _kinds(result)}
    shown = result.facts[:facts]
    rows = [len(POSITIONS), *(len(fact.tokens) for fact in shown)]
    heights = [_INCHES_A_TOKEN * count + _INCHES_AROUND for count in rows]
    figure = Figure(figsize=(15, sum(heights) + 0.3), layout="constrained", dpi=120)
    grids = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]

    count = len(result.facts)
    title = f"Average indirect effect over {count} fact{'s' if count != 1 else ''}, in probability"
    tops = {kind: float(values.nan_to_num(0).max()) for kind, values in averages.items()}
    bounds = (0.0, max([*tops.values(), 1e-6]))
    _draw(grids[0], title, averages, POSITIONS, bounds, "Δp", result)
    for grid, fact in zip(grids[1:], shown, strict=True):
        answer = fact.answer.strip() or repr(fact.answer)
        title = (
            f"“{_plain(fact.prompt)}” → {answer}     "
            f"clean {fact.high:.3f}, subject corrupted {fact.low:.3f}"
        )
        bounds = (fact.low, max(fact.high, fact.low + 1e-6))
        _draw(grid, title, dict(fact.scores), _labels(fact), bounds, f"p({answer})", result)
    return figure


def _kinds(result: TracingResult) -> list[Kind]:
    return list(result.facts[0].scores if result.facts else _PANELS)


def _labels(fact: FactTrace) -> list[str]:
    start, stop = fact.subject_range
    return [
        f"{_plain(token)}{'*' if start <= i < stop else ''}" for i, token in enumerate(fact.tokens)
    ]


def _plain(text: str) -> str:
    """Text without line breaks, and without dollar signs that matplotlib would read as formulas."""
    return " ".join(text.split()).replace("$", r"\$") or repr(text)


def _draw(
    grid: SubFigure,
    title: str,
    values: dict[Kind, Tensor],
    labels: Sequence[str],
    bounds: tuple[float, float],
    unit: str,
    result: TracingResult,
) -> None:
    """One row of panels that share their scale."""
    grid.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    panels = grid.subplots(1, len(values), sharey=True, squeeze=False)[0]
    low, high = bounds
    for panel, (kind, value_TL) in zip(panels, values.items(), strict=True):
        colors, name = _PANELS[kind]
        mesh = panel.pcolormesh(value_TL.numpy(), cmap=colors, vmin=low, vmax=high)
        panel.set_title(f"Restored: {name.format(result.settings.window)}", fontsize=10)
        panel.set_facecolor("0.9")  # no such tokens
        panel.invert_yaxis()
        layers = value_TL.shape[1]
        step = max(1, layers // 6)
        ticks = list(range(0, layers, step))
        panel.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
        panel.set_yticks([i + 0.5 for i in range(len(labels))], labels)
        panel.tick_params(length=0, labelsize=9)
        panel.set_xlabel("layer" if kind == "hidden" else "middle layer of the window", fontsize=9)
        for side in panel.spines.values():
            side.set_visible(False)
        bar = grid.colorbar(mesh, ax=panel, pad=0.02, aspect=12)
        bar.ax.set_title(unit, fontsize=8, pad=6)
        bar.ax.tick_params(labelsize=8, length=2)
        bar.outline.set_visible(False)
