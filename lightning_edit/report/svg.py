# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The pictures of the report as inline SVG: no script, no file beside it, named for readers aloud.

Colors and dash patterns are classes of ``page.css``, so that light and dark follow the reader.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from lightning_edit.rendering.escaping import visible
from lightning_edit.report.glossary import metric_name
from lightning_edit.report.results import MetricRow, RunReport
from lightning_edit.report.summary import Gap
from lightning_edit.report.text import percent

__all__ = [
    "gap_chart",
    "metric_bar",
    "sequence_chart",
    "sequence_legend",
    "sequence_series",
]

QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
MAX_MARKERS = 60  # on a line; more would hide it
MAX_SERIES = 6  # as many as page.css tells apart by color, dash and marker


def _open(width: float, height: float, label: str, css: str = "chart") -> str:
    return (
        f'<svg class="{css}" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_escape(label)}">'
    )


def _escape(text: str) -> str:
    return html.escape(visible(text), quote=True)


def metric_bar(row: MetricRow) -> str:
    """A rate before (tick) and after (bar) on a scale from 0 to 1, with its 95 % interval."""
    width, height, left = 200.0, 22.0, 5.0
    scale = width - 2 * left

    def x(share: float) -> float:
        return round(left + scale * min(max(share, 0.0), 1.0), 2)

    label = f"before {percent(row.before)}, after {percent(row.after)}"
    if row.ci:
        label += f", 95 % interval {percent(row.ci[0])} to {percent(row.ci[1])}"
    parts = [_open(width, height, label, "bar")]
    parts.append(f'<rect class="track" x="{left:g}" y="3" width="{scale:g}" height="10" rx="2"/>')
    if row.after is not None:
        parts.append(
            f'<rect class="after" x="{left:g}" y="3" width="{x(row.after) - left:.2f}" '
            'height="10" rx="2"/>'
        )
    parts.append(f'<line class="grid" x1="{x(0.5):g}" x2="{x(0.5):g}" y1="3" y2="13"/>')
    if row.ci:  # under the bar: upon it, one of the two would be hard to see
        low, high = x(row.ci[0]), x(row.ci[1])
        whisker = f"M{low:g} 18.5H{high:g}M{low:g} 16V21M{high:g} 16V21"
        parts.append(f'<path class="whisker" d="{whisker}"/>')
    if row.before is not None:
        tick = f"M{x(row.before):g} 0V16"
        parts.append(f'<path class="halo" d="{tick}"/><path class="before" d="{tick}"/>')
    return "".join([*parts, "</svg>"])


def gap_chart(gaps: Sequence[Gap]) -> str:
    """Two dots a metric, teacher-forced and autoregressive, joined by their gap."""
    # Labels stand above their lines, so that the picture is legible on a phone, too.
    left, width, step = 12.0, 420.0, 52.0
    scale = width - 2 * left
    height = step * len(gaps) + 30

    def x(share: float) -> float:
        return round(left + scale * min(max(share, 0.0), 1.0), 2)

    label = "; ".join(
        f"{gap.label}: teacher-forced {percent(gap.teacher_forced)}, "
        f"autoregressive {percent(gap.autoregressive)}"
        for gap in gaps
    )
    parts = [_open(width, height, label, "chart gap")]
    parts += [
        f'<line class="grid" x1="{x(share):g}" x2="{x(share):g}" y1="6" y2="{height - 22:g}"/>'
        f'<text class="axis" x="{min(max(x(share), 20.0), width - 20):g}" '
        f'y="{height - 6:g}" text-anchor="middle">'
        f"{percent(share)}</text>"
        for share in QUARTERS
    ]
    for i, gap in enumerate(gaps):
        y = 6 + step * i + 34
        forced, free = x(gap.teacher_forced), x(gap.autoregressive)
        parts.append(
            f'<text x="{left - 6:g}" y="{y - 16:g}">{_escape(gap.label)}</text>'
            f'<line class="span" x1="{forced:g}" x2="{free:g}" y1="{y:g}" y2="{y:g}"/>'
            f'<circle class="forced" cx="{forced:g}" cy="{y:g}" r="6.5"/>'
            f'<circle class="free" cx="{free:g}" cy="{y:g}" r="6.5"/>'
            f'<text class="value" x="{width - 6:g}" y="{y - 16:g}" text-anchor="end">'
            f"{gap.points} points</text>"
        )
    return "".join([*parts, "</svg>"])


def sequence_series(report: RunReport) -> dict[str, list[tuple[float, float]]]:
    """The curves of a sequence: name -> points (edits or steps, value), rates, at most six."""
    series: dict[str, list[tuple[float, float]]] = {}
    for i, point in enumerate(report.sequence):
        at = point.get("edits") or point.get("step") or i + 1
        for name, value in point.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if name not in ("edits", "step") and metric_name(name).is_rate:
                series.setdefault(name, []).append((float(at), float(value)))
    return dict(list(series.items())[:MAX_SERIES])


def _metric_label(name: str) -> str:
    return metric_name(name).full_label


def sequence_chart(
    series: dict[str, list[tuple[float, float]]],
    unit: str = "edits",
    label_of: Callable[[str], str] = _metric_label,
    width: float = 980.0,
) -> str:
    """Rates against edits or steps made; every line has its own color, dash and marker."""
    height, left, right, top, bottom = 300.0, 56.0, 16.0, 12.0, 44.0
    places = sorted({at for points in series.values() for at, _ in points})
    first, last = places[0], places[-1]
    span = (last - first) or 1.0

    def x(at: float) -> float:
        return round(left + (width - left - right) * (at - first) / span, 2)

    def y(share: float) -> float:
        return round(top + (height - top - bottom) * (1 - min(max(share, 0.0), 1.0)), 2)

    label = "; ".join(
        f"{label_of(name)}: {percent(points[0][1])} after "
        f"{points[0][0]:.12g} {unit}, {percent(points[-1][1])} after {points[-1][0]:.12g}"
        for name, points in series.items()
    )
    parts = [_open(width, height, label)]
    parts += [
        f'<line class="grid" x1="{left:g}" x2="{width - right:g}" y1="{y(share):g}" '
        f'y2="{y(share):g}"/><text class="axis" x="{left - 8:g}" y="{y(share) + 4:g}" '
        f'text-anchor="end">{percent(share)}</text>'
        for share in QUARTERS
    ]
    taken = -width
    for at in places:
        if x(at) - taken >= 48:  # room for five digits
            taken = x(at)
            parts.append(
                f'<text class="axis" x="{taken:g}" y="{height - 24:g}" text-anchor="middle">'
                f"{at:.12g}</text>"
            )
    parts.append(
        f'<text class="axis" x="{(left + width - right) / 2:g}" y="{height - 5:g}" '
        f'text-anchor="middle">{unit} made</text>'
    )
    for i, (name, points) in enumerate(series.items()):
        path = "M" + "L".join(f"{x(at):g} {y(value):g}" for at, value in points)
        parts.append(f'<g data-series="{_escape(name)}"><path class="line series{i}" d="{path}"/>')
        if len(points) <= MAX_MARKERS:
            for at, value in points:
                told = f"{label_of(name)}: {percent(value)} after {at:.12g} {unit}"
                parts.append(_marker(i, x(at), y(value), told))
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def sequence_legend(
    series: dict[str, list[tuple[float, float]]],
    label_of: Callable[[str], str] = _metric_label,
) -> str:
    """The key to ``sequence_chart``, in its colors, dashes and markers."""
    items = (
        f'<li data-series="{_escape(name)}">'
        f'<svg class="key" viewBox="0 0 44 14" aria-hidden="true">'
        f'<path class="line series{i}" d="M2 7H42"/>{_marker(i, 22, 7)}</svg>'
        f"{_escape(label_of(name))}</li>"
        for i, name in enumerate(series)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _marker(i: int, x: float, y: float, told: str = "") -> str:
    shapes = (
        f"M{x - 4:g} {y:g}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
        f"M{x - 4:g} {y - 4:g}h8v8h-8Z",
        f"M{x:g} {y - 5:g}l5 9h-10Z",
        f"M{x:g} {y - 5:g}l5 5l-5 5l-5 -5Z",
    )
    path = f'<path class="marker series{i}" d="{shapes[i % len(shapes)]}"/>'
    return f"<g><title>{_escape(told)}</title>{path}</g>" if told else path
