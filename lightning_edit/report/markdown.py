# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The report as Markdown: the same facts as the HTML page, for repositories and terminals."""

from __future__ import annotations

from lightning_edit.report.results import RunReport
from lightning_edit.report.summary import outcomes
from lightning_edit.report.table import metrics_table
from lightning_edit.report.text import DASH, number
from lightning_edit.report.view import render_report

__all__ = ["render_markdown"]


def render_markdown(report: RunReport) -> str:
    """The report as one Markdown text.

    Examples:
        >>> from lightning_edit.report.results import EditRow
        >>> edit = EditRow(id="a", prompt="2 * 2 =", target_new="5",
        ...                after={"reliability/autoregressive": 1.0})
        >>> render_markdown(RunReport(method="ROME", edits=[edit])).splitlines()[0]
        '# The fact was changed.'
    """
    curves = dict.fromkeys(name for point in report.sequence for name in point)
    return render_report(
        "report.md",
        report,
        outcomes=list(outcomes(report).values()),
        metrics_table=metrics_table(report, "md"),
        curves=[name for name in curves if name not in ("edits", "step")],
        figure=_figure,
        folder=f"{report.artifact}/",
    )


def _figure(value: object) -> str:
    if isinstance(value, float):
        return number(value, 3)
    return DASH if value is None else str(value)
