# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A comparison's tables and curves, for people: HTML, Markdown, LaTeX; and CSV with every digit."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from lightning_edit.benchmark.conflicts import CONFLICTS
from lightning_edit.benchmark.figure import Figure
from lightning_edit.benchmark.statistics import RATES, frame_of
from lightning_edit.rendering.templates import render
from lightning_edit.report.files import write_file
from lightning_edit.report.glossary import METRICS, READINGS
from lightning_edit.report.svg import MAX_SERIES, sequence_chart, sequence_legend
from lightning_edit.report.text import DASH, byte_count, interval, number

__all__ = ["FORMATS", "ComparisonTable", "Curve", "Section", "sections", "write_tables"]

#: Endings of the files that ``write_tables`` writes.
FORMATS = ("html", "md", "tex", "csv")
# Nothing may be fetched, and nothing run but the page's own script, whatever a label or an id says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src '{script}'"
# Two of them, side by side, are as wide as the page.
_CHART_WIDTH = 470.0


class TableCell(NamedTuple):
    """A cell of a table.

    Args:
        text: What it says.
        key: What its column is sorted by; nan where there is no number.
    """

    text: str
    key: float = math.nan


@dataclass(frozen=True)
class ComparisonTable:
    """Cells under headings.

    Args:
        title: What it shows.
        columns: Headings; those that begin with ``>`` are of columns of numbers.
        cells: As many in each row as there are columns; the first one names the row.
    """

    title: str
    columns: Sequence[str]
    cells: Sequence[Sequence[TableCell]]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The text of each cell."""
        return [tuple(cell.text for cell in row) for row in self.cells]

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """Headings, and whether the column is one of numbers."""
        return [(column.removeprefix(">"), column.startswith(">")) for column in self.columns]

    @property
    def has_metrics(self) -> bool:
        """Whether each row is of one metric, which its second cell names."""
        return "metric" in self.columns[1:2]


@dataclass(frozen=True)
class Curve:
    """A metric over a sequence of edits, a line a method.

    Args:
        metric: The metric.
        reading: ``teacher_forced`` or ``autoregressive``.
        title: Both, as a heading.
        legend: Inline SVG and HTML of the key.
        chart: Inline SVG.
        values: The same figures as a table.
    """

    metric: str
    reading: str
    title: str
    legend: Markup
    chart: Markup
    values: ComparisonTable


@dataclass(frozen=True)
class Section:
    """One data set by one protocol.

    Args:
        data: The data set.
        protocol: The protocol.
        tables: Of its methods.
        curves: Over the sequence, where there is one.
        along: The curves as a table a metric, for what cannot show them.
    """

    data: str
    protocol: str
    tables: Sequence[ComparisonTable]
    curves: Sequence[Curve] = field(default_factory=tuple)
    along: Sequence[ComparisonTable] = field(default_factory=tuple)

    @property
    def title(self) -> str:
        """Both of them."""
        return f"{self.data}, {self.protocol}"

    @property
    def texts(self) -> list[ComparisonTable]:
        """All that can be said without a picture."""
        return [*self.tables, *self.along]


def sections(found: Sequence[Figure]) -> list[Section]:
    """Tables and curves of all figures, a section a data set and protocol.

    Args:
        found: The figures.

    Examples:
        >>> row = Figure("Facts", "independent", "ROME", 1, True, "reliability", value=1.0,
        ...              reading="autoregressive", n=10, requests=10)
        >>> [section] = sections([row])
        >>> section.tables[0].rows
        [('ROME', '– / 1.00', '– / –', '– / –', '– / –', '–', '–', '–')]
    """
    made = []
    for data, protocol in dict.fromkeys((figure.data, figure.protocol) for figure in found):
        own = [f for f in found if (f.data, f.protocol) == (data, protocol)]
        final = [figure for figure in own if figure.is_final]
        tables = [_summary(final), _rates(final), _differences(final), _kinds(final)]
        tables.append(_conflicts(final))
        whole = [table for table in tables if table.cells]
        made.append(Section(data, protocol, whole, _curves(own), list(_along(own))))
    return made


def write_tables(
    folder: Path, name: str, found: Sequence[Figure], facts: Mapping[str, str], notes: Sequence[str]
) -> list[Path]:
    """Writes ``name.html``, ``name.md``, ``name.tex`` and ``name.csv``, each whole or not at all.

    Args:
        folder: Where to.
        name: Of the study.
        found: Its figures.
        facts: What is to be known of the whole, name -> value.
        notes: What is to be said besides, such as what failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    style = (files("lightning_edit.report") / "templates" / "page.css").read_text("utf-8")
    script = (files("lightning_edit.benchmark") / "templates" / "tables.js").read_text("utf-8")
    values = {
        "study": name,
        "sections": sections(found),
        "choices": {
            "data": list(dict.fromkeys(figure.data for figure in found)),
            "protocol": list(dict.fromkeys(figure.protocol for figure in found)),
            "method": list(dict.fromkeys(figure.method for figure in found)),
            "metric": [m for m in RATES if any(figure.metric == m for figure in found)],
        },
        "facts": facts,
        "notes": list(notes),
        "terms": [METRICS[metric] for metric in RATES],
        "readings": [READINGS[reading] for reading in ("teacher_forced", "autoregressive")],
        "policy": _POLICY.format(script=_source_hash(script)),
        "style": Markup(style),  # noqa: S704 - a file of the package
        "script": Markup(script),  # noqa: S704 - likewise
    }
    texts: dict[str, Callable[[], str]] = {
        kind: lambda kind=kind: str(render("lightning_edit.benchmark", f"tables.{kind}", **values))  # type: ignore[misc]
        for kind in ("html", "md", "tex")
    }
    texts["csv"] = lambda: str(frame_of(found).to_csv(index=False, lineterminator="\n"))
    written = []
    for kind in FORMATS:
        write_file(folder / f"{name}.{kind}", texts[kind]())
        written.append(folder / f"{name}.{kind}")
    return written


def _source_hash(script: str) -> str:
    """What a page's policy calls the one script that it may run."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


class _Lookup:
    """Figures of a section by method, metric, kind and reading."""

    def __init__(self, found: Sequence[Figure]) -> None:
        self._found = {(f.method, f.metric, f.kind, f.reading): f for f in found}
        self.methods = list(dict.fromkeys(figure.method for figure in found))

    def get(self, method: str, metric: str, kind: str = "", reading: str = "") -> Figure | None:
        return self._found.get((method, metric, kind, reading))

    def value(self, method: str, metric: str) -> float | None:
        figure = self.get(method, metric)
        return figure.value if figure else None

    def both(self, method: str, metric: str, kind: str = "") -> tuple[Figure | None, Figure | None]:
        """Teacher-forced and autoregressive."""
        return (
            self.get(method, metric, kind, "teacher_forced"),
            self.get(method, metric, kind, "autoregressive"),
        )


def _number(value: float | None, digits: int | None = None) -> TableCell:
    return TableCell(number(value, digits), math.nan if value is None else value)


def _interval(ends: tuple[float, float] | None) -> TableCell:
    return TableCell(interval(ends, 3), math.nan if ends is None else ends[0])


def _pair(figures: tuple[Figure | None, Figure | None]) -> TableCell:
    """Both readings; sorted by the autoregressive one, which is what users will see."""
    text = " / ".join(DASH if f is None else number(f.value, 2) for f in figures)
    strictest = figures[1] or figures[0]
    return TableCell(text, strictest.value if strictest else math.nan)


def _summary(found: Sequence[Figure]) -> ComparisonTable:
    look = _Lookup(found)
    has_prose = any(figure.metric == "perplexity_ratio" for figure in found)
    columns = ["method", *(f">{METRICS[metric].label.lower()}" for metric in RATES)]
    columns += [">s an edit", ">peak memory", ">failed"]
    columns += [">perplexity ratio"] if has_prose else []
    rows = []
    for method in look.methods:
        peak, failed = look.value(method, "peak_memory_bytes"), look.value(method, "failed")
        cells = [TableCell(method), *(_pair(look.both(method, metric)) for metric in RATES)]
        cells.append(_number(look.value(method, "seconds")))
        held = byte_count(None if peak is None else int(peak))
        cells.append(TableCell(held, math.nan if peak is None else peak))
        cells.append(_number(failed, 0))
        cells += [_number(look.value(method, "perplexity_ratio"))] if has_prose else []
        rows.append(cells)
    return ComparisonTable("Teacher-forced / autoregressive", columns, rows)


def _rates(found: Sequence[Figure]) -> ComparisonTable:
    look = _Lookup(found)
    columns = ["method", "metric", ">teacher-forced", ">95 % interval", ">autoregressive"]
    columns += [">95 % interval", ">gap", ">n", ">requests"]
    rows = []
    for metric in RATES:
        for method in look.methods:
            forced, free = look.both(method, metric)
            one = forced or free
            if one is None:
                continue
            cells = [TableCell(method), TableCell(metric)]
            for figure in (forced, free):
                cells.append(_number(figure.value if figure else None, 3))
                cells.append(_interval((figure.low, figure.high) if figure else None))
            counts = (TableCell(str(count), count) for count in (one.n, one.requests))
            rows.append([*cells, _number(one.gap, 3), *counts])
    return ComparisonTable("With intervals", columns, rows)


def _differences(found: Sequence[Figure]) -> ComparisonTable:
    look = _Lookup(found)
    [reference] = {figure.reference for figure in found if figure.reference} or {""}
    columns = ["method", "metric", ">teacher-forced", ">95 % interval", ">p"]
    columns += [">autoregressive", ">95 % interval", ">p"]
    rows = []
    for metric in RATES:
        for method in look.methods:
            both = look.both(method, metric)
            if not any(figure and figure.reference for figure in both):
                continue
            cells = [TableCell(method), TableCell(metric)]
            for figure in both:
                cells.append(_signed(figure.difference if figure else None))
                ends = (figure.difference_low, figure.difference_high) if figure else None
                cells += [_interval(ends), _number(figure.p if figure else None, 4)]
            rows.append(cells)
    return ComparisonTable(f"Difference from {reference}, on the same requests", columns, rows)


def _signed(value: float | None) -> TableCell:
    cell = _number(value, 3)
    text = cell.text.removeprefix("-0.000") or "0.000"
    return cell._replace(text=f"+{text}" if text[0].isdigit() else text)


def _kinds(found: Sequence[Figure]) -> ComparisonTable:
    look = _Lookup(found)
    kinds = dict.fromkeys((figure.metric, figure.kind) for figure in found if figure.kind)
    columns = ["method"]
    for metric, kind in kinds:
        of_kind = [f for f in found if (f.metric, f.kind) == (metric, kind)]
        counted = max(figure.n for figure in of_kind)
        columns.append(f">{metric}: {kind.replace('_', ' ')} (n = {counted})")
    rows = [
        [TableCell(method), *(_pair(look.both(method, metric, kind)) for metric, kind in kinds)]
        for method in look.methods
        if kinds
    ]
    return ComparisonTable("By kind of the probes, teacher-forced / autoregressive", columns, rows)


def _conflicts(found: Sequence[Figure]) -> ComparisonTable:
    look = _Lookup(found)
    metrics = [metric for metric in CONFLICTS if any(f.metric == metric for f in found)]
    columns = ["method"]
    for metric in metrics:
        pairs = max(figure.requests for figure in found if figure.metric == metric)
        columns += [f">{metric.replace('_', ' ')} (n = {pairs})", ">95 % interval"]
    rows = []
    for method in look.methods:
        figures = [look.get(method, metric) for metric in metrics]
        if any(figures):
            cells = [TableCell(method)]
            for figure in figures:
                cells.append(_number(figure.value if figure else None, 3))
                cells.append(_interval((figure.low, figure.high) if figure else None))
            rows.append(cells)
    return ComparisonTable("Pairs of edits that contradict each other", columns, rows)


def _points(found: Sequence[Figure]) -> list[Figure]:
    """What curves are made of; nothing where all was measured at the end alone."""
    if all(figure.is_final for figure in found):
        return []
    return [f for f in found if f.metric in RATES and not f.kind and f.edits]


def _along(found: Sequence[Figure]) -> Iterator[ComparisonTable]:
    """A table a metric over a sequence, each cell in both readings."""
    points = _points(found)
    places = sorted({figure.edits for figure in points})
    for metric in RATES:
        of_metric = [figure for figure in points if figure.metric == metric]
        looks = [_Lookup([figure for figure in of_metric if figure.edits == at]) for at in places]
        rows = [
            [TableCell(method), *(_pair(look.both(method, metric)) for look in looks)]
            for method in _Lookup(of_metric).methods
        ]
        title = f"{METRICS[metric].label} of the edits so far, teacher-forced / autoregressive"
        if rows:
            yield ComparisonTable(title, ["method", *(f">after {at}" for at in places)], rows)


def _curves(found: Sequence[Figure]) -> list[Curve]:
    made = []
    points = _points(found)
    for metric in RATES:
        of_metric = [figure for figure in points if figure.metric == metric]
        names = _Lookup(of_metric).methods
        if not names:
            continue
        charts = math.ceil(len(names) / MAX_SERIES)
        size = math.ceil(len(names) / charts)  # seven are four and three, not six and one
        for start in range(0, len(names), size):
            part = names[start : start + size]
            for reading in ("teacher_forced", "autoregressive"):
                series: dict[str, list[tuple[float, float]]] = {}
                for figure in sorted(of_metric, key=lambda f: f.edits):
                    if figure.reading == reading and figure.method in part:
                        point = (float(figure.edits), figure.value)
                        series.setdefault(figure.method, []).append(point)
                if series:
                    made.append(_curve(metric, reading, series))
    return made


def _curve(metric: str, reading: str, series: dict[str, list[tuple[float, float]]]) -> Curve:
    title = f"{METRICS[metric].label}, {READINGS[reading].label}, of the edits so far"
    places = sorted({at for points in series.values() for at, _ in points})
    rows = []
    for name, points in series.items():
        values = dict(points)
        rows.append([TableCell(name), *(_number(values.get(at), 3) for at in places)])
    columns = ["method", *(f">after {at:g}" for at in places)]
    return Curve(
        metric,
        reading,
        title,
        Markup(sequence_legend(series, str)),  # noqa: S704 - escaped in there
        Markup(sequence_chart(series, "edits", str, _CHART_WIDTH)),  # noqa: S704
        ComparisonTable(title, columns, rows),
    )
