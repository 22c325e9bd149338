# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file that opens anywhere: no network, no script, no file beside it."""

from __future__ import annotations

from lightning_edit.report.results import EditRow, RunReport
from lightning_edit.report.summary import ROLES, outcomes, role_outcome, select_edits, success
from lightning_edit.report.svg import (
    gap_chart,
    metric_bar,
    sequence_chart,
    sequence_legend,
    sequence_series,
)
from lightning_edit.report.view import layer_rows, render_report

__all__ = ["render_html"]

MAX_LAYERS = 40

# Nothing may be fetched or run, whatever a prompt or a model's answer says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_TILES = {
    "reliability": "new answers given",
    "generality": "rephrased prompts follow",
    "locality": "neighbors unchanged",
    "portability": "consequences follow",
}


def render_html(report: RunReport) -> str:
    """The report as a self-contained HTML page.

    Examples:
        >>> page = render_html(RunReport(method="ROME", notes=["<script>alert(1)</script>"]))
        >>> "<script" in page, page.startswith("<!doctype html>")
        (False, True)
    """
    found = outcomes(report)
    edits, _ = select_edits(report.edits)
    rows = layer_rows(report)
    largest = sorted(rows, key=lambda row: -(row[1] or 0.0))[:MAX_LAYERS]
    # The page draws the curves of rates; of prose it tells where they end.
    prose = [point for point in report.sequence if point.get("perplexity_ratio") is not None]
    return render_report(
        "report.html",
        report,
        policy=_POLICY,
        tiles=[(found[metric], text) for metric, text in _TILES.items() if metric in found],
        choices=_choices(edits),
        moved=_moved,
        roles=ROLES,
        role_outcome=role_outcome,
        drawn=[row for row in rows if row in largest],
        prose=prose[-1] if prose else None,
        series=sequence_series(report),
        gap_chart=gap_chart,
        metric_bar=metric_bar,
        sequence_chart=sequence_chart,
        sequence_legend=sequence_legend,
    )


def _choices(edits: list[EditRow]) -> list[tuple[str, str]]:
    """What edits can be picked out: the value of a button and its label."""
    missed = sum(success(edit)[0] is False for edit in edits)
    moved = sum(_moved(edit) for edit in edits)
    choices = [("all", f"all {len(edits)}")]
    choices += [("missed", f"{missed} without the new answer")] if missed else []
    choices += [("moved", f"{moved} with a changed neighbor")] if moved else []
    return choices


def _moved(edit: EditRow) -> bool:
    return any(p.role == "locality" and p.unchanged is False for p in edit.probes)
