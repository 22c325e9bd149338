# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The table of the metrics: for the console, for Markdown, for papers and for spreadsheets."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Literal, overload

from lightning_edit.core.errors import MissingDependencyError
from lightning_edit.rendering.escaping import escape_latex, escape_markdown
from lightning_edit.report.glossary import metric_name, sort_metrics
from lightning_edit.report.results import RunReport
from lightning_edit.report.text import interval, number

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["COLUMNS", "escape_latex", "escape_markdown", "metrics_rows", "metrics_table"]

COLUMNS = ("metric", "reading", "before", "after", "95 % interval", "n")


@overload
def metrics_table(report: RunReport, fmt: Literal["rich"]) -> Table: ...
@overload
def metrics_table(report: RunReport, fmt: Literal["md", "latex", "csv"]) -> str: ...
def metrics_table(
    report: RunReport, fmt: Literal["rich", "md", "latex", "csv"] = "rich"
) -> Table | str:
    """The metrics before and after, with the 95 % interval of the value after and n.

    Args:
        report: The run.
        fmt: ``rich`` for the console, ``md``, ``latex`` (needs the package booktabs), or ``csv``
            (every digit, empty where unknown).

    Returns:
        A table of the package rich, or text.

    Raises:
        MissingDependencyError: If ``rich`` is asked for and not installed.
        ValueError: If the format is unknown.

    Examples:
        >>> from lightning_edit.report.results import MetricRow
        >>> row = MetricRow(before=0.0, after=0.9, n=10, ci=(0.6, 0.98))
        >>> report = RunReport(method="ROME", metrics={"reliability/autoregressive": row})
        >>> print(metrics_table(report, "md"))
        | metric | reading | before | after | 95 % interval | n |
        |---|---|--:|--:|--:|--:|
        | Reliability | autoregressive | 0.000 | 0.900 | 0.600 – 0.980 | 10 |
        >>> print(metrics_table(report, "csv"))
        metric,reading,before,after,ci_low,ci_high,n
        reliability,autoregressive,0.0,0.9,0.6,0.98,10
    """
    if fmt == "rich":
        return _rich(report)
    if fmt == "md":
        lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|--:|--:|--:|--:|"]
        lines += [f"| {' | '.join(map(escape_markdown, row))} |" for row in metrics_rows(report)]
        return "\n".join(lines)
    if fmt == "latex":
        head = " & ".join(map(escape_latex, COLUMNS))
        body = [f"{' & '.join(map(escape_latex, row))} \\\\" for row in metrics_rows(report)]
        return "\n".join(
            [
                r"\begin{tabular}{llrrrr}",
                r"\toprule",
                rf"{head} \\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )
    if fmt == "csv":
        return _csv(report)
    raise ValueError(f"`fmt` is expected to be 'rich', 'md', 'latex' or 'csv', but got {fmt!r}.")


def metrics_rows(report: RunReport) -> list[tuple[str, ...]]:
    """The cells of the table, without its heading."""
    rows: list[tuple[str, ...]] = []
    for key in sort_metrics(report.metrics):
        name, row = metric_name(key), report.metrics[key]
        digits = 3 if name.is_rate else None
        rows.append(
            (
                name.label,
                name.reading_label,
                number(row.before, digits),
                number(row.after, digits),
                interval(row.ci, digits),
                str(row.n),
            )
        )
    return rows


def _csv(report: RunReport) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", "reading", "before", "after", "ci_low", "ci_high", "n"])
    for key in sort_metrics(report.metrics):
        name, row = metric_name(key), report.metrics[key]
        metric = "/".join(filter(None, (name.metric, name.kind)))
        low, high = row.ci or (None, None)
        writer.writerow([metric, name.reading, row.before, row.after, low, high, row.n])
    return text.getvalue().rstrip("\n")


def _rich(report: RunReport) -> Table:
    try:
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        raise MissingDependencyError("rich", "cli", "The table on the console") from None
    table = Table()
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    previous = ""
    for label, *rest in metrics_rows(report):
        # Text keeps square brackets in names from being read as markup.
        table.add_row(Text("" if label == previous else label), *map(Text, rest))
        previous = label
    return table
