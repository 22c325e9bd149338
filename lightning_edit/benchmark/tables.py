# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A comparison's tables and curves, for people: HTML, Markdown, LaTeX; and CSV with every digit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from lightning_edit.benchmark.statistics import RATES, Figure, frame_of
from lightning_edit.rendering.templates import render
from lightning_edit.report.files import write_file
from lightning_edit.report.glossary import METRICS, READINGS
from lightning_edit.report.svg import MAX_SERIES, sequence_chart, sequence_legend
from lightning_edit.report.text import DASH, byte_count, interval, number

__all__ = ["FORMATS", "ComparisonTable", "Curve", "Section", "sections", "write_tables"]

#: Endings of the files that ``write_tables`` writes.
FORMATS = ("html", "md", "tex", "csv")
# Nothing may be fetched or run, whatever a label or an id says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class ComparisonTable:
    """Cells of text under headings.

    Args:
        title: What it shows.
        columns: Headings; those that begin with ``>`` are of columns of numbers.
        rows: Cells, as many in each row as there are columns; the first one names the row.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """Headings, and whether the column is one of numbers."""
        return [(column.removeprefix(">"), column.startswith(">")) for column in self.columns]


@dataclass(frozen=True)
class Curve:
    """A metric over a sequence of edits, a line a method.

    Args:
        title: The metric and its reading.
        legend: Inline SVG and HTML of the key.
        chart: Inline SVG.
    """

    title: str
    legend: Markup
    chart: Markup


@dataclass(frozen=True)
class Section:
    """One data set by one protocol.

    Args:
        title: Both of them.
        tables: Of its methods.
        curves: Over the sequence, where there is one.
    """

    title: str
    tables: Sequence[ComparisonTable]
    curves: Sequence[Curve] = field(default_factory=tuple)


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
        whole = [table for table in tables if table.rows]
        made.append(Section(f"{data}, {protocol}", whole, _curves(own)))
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
    values = {
        "study": name,
        "sections": sections(found),
        "facts": facts,
        "notes": list(notes),
        "terms": [METRICS[metric] for metric in RATES],
        "readings": [READINGS[reading] for reading in ("teacher_forced", "autoregressive")],
        "policy": _POLICY,
        "style": Markup(style),  # noqa: S704 - a file of the package
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


def _pair(figures: tuple[Figure | None, Figure | None]) -> str:
    return " / ".join(DASH if f is None else number(f.value, 2) for f in figures)


def _summary(found: Sequence[Figure]) -> ComparisonTable:
    look = _Lookup(found)
    has_prose = any(figure.metric == "perplexity_ratio" for figure in found)
    columns = ["method", *(f">{METRICS[metric].label.lower()}" for metric in RATES)]
    columns += [">s an edit", ">peak memory", ">failed"]
    columns += [">perplexity ratio"] if has_prose else []
    rows = []
    for method in look.methods:
        peak, failed = look.value(method, "peak_memory_bytes"), look.value(method, "failed")
        cells = [method, *(_pair(look.both(method, metric)) for metric in RATES)]
        cells.append(number(look.value(method, "seconds")))
        cells.append(byte_count(None if peak is None else int(peak)))
        cells.append(DASH if failed is None else f"{failed:.0f}")
        cells += [number(look.value(method, "perplexity_ratio"))] if has_prose else []
        rows.append(tuple(cells))
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
            cells = [method, metric]
            for figure in (forced, free):
                ends = None if figure is None else (figure.low, figure.high)
                cells += [number(figure.value if figure else None, 3), interval(ends, 3)]
            rows.append((*cells, number(one.gap, 3), str(one.n), str(one.requests)))
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
            cells = [method, metric]
            for figure in both:
                ends = None if figure is None else (figure.difference_low, figure.difference_high)
                cells.append(_signed(figure.difference if figure else None))
                cells += [interval(ends, 3), number(figure.p if figure else None, 4)]
            rows.append(tuple(cells))
    return ComparisonTable(f"Difference from {reference}, on the same requests", columns, rows)


def _signed(value: float | None) -> str:
    text = number(value, 3).removeprefix("-0.000") or "0.000"
    return f"+{text}" if text[0].isdigit() else text


def _kinds(found: Sequence[Figure]) -> ComparisonTable:
    look = _Lookup(found)
    kinds = dict.fromkeys((figure.metric, figure.kind) for figure in found if figure.kind)
    columns = ["method"]
    for metric, kind in kinds:
        of_kind = [f for f in found if (f.metric, f.kind) == (metric, kind)]
        counted = max(figure.n for figure in of_kind)
        columns.append(f">{metric}: {kind.replace('_', ' ')} (n = {counted})")
    rows = [
        (method, *(_pair(look.both(method, metric, kind)) for metric, kind in kinds))
        for method in look.methods
        if kinds
    ]
    return ComparisonTable("By kind of the probes, teacher-forced / autoregressive", columns, rows)


def _curves(found: Sequence[Figure]) -> list[Curve]:
    if all(figure.is_final for figure in found):
        return []
    made = []
    drawn = [f for f in found if f.metric in RATES and not f.kind and f.edits]
    for metric in RATES:
        for reading in ("teacher_forced", "autoregressive"):
            series: dict[str, list[tuple[float, float]]] = {}
            for figure in sorted(drawn, key=lambda f: f.edits):
                if (figure.metric, figure.reading) == (metric, reading):
                    point = (float(figure.edits), figure.value)
                    series.setdefault(figure.method, []).append(point)
            names = list(series)
            for start in range(0, len(names), MAX_SERIES):
                part = {name: series[name] for name in names[start : start + MAX_SERIES]}
                made.append(
                    Curve(
                        f"{METRICS[metric].label}, {READINGS[reading].label}, of the edits so far",
                        Markup(sequence_legend(part, str)),  # noqa: S704 - escaped in there
                        Markup(sequence_chart(part, "edits", str)),  # noqa: S704
                    )
                )
    return made
