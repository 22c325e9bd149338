# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The card of a run (``README.md``): what the edited model is, how to use it, how to undo it."""

from __future__ import annotations

from lightning_edit.rendering.card import make_card
from lightning_edit.report.results import RunReport
from lightning_edit.report.summary import headline
from lightning_edit.report.table import metrics_table
from lightning_edit.report.undo import CAUTION, INTENDED_USE, UNDO, apply_commands, apply_python

__all__ = ["render_card"]


def render_card(report: RunReport) -> str:
    """The model card of a run: only what is known, nothing left to fill in.

    Examples:
        >>> card = render_card(RunReport(method="ROME", model={"id": "acme/tiny"}))
        >>> card.split("---")[1].split()
        ['base_model:', 'acme/tiny', 'library_name:', 'lightning_edit', 'tags:', '-',
         'knowledge-editing', '-', 'rome']
    """
    model = {name: str(value) for name, value in report.model.items() if value}
    return make_card(
        "run",
        library="lightning_edit",
        method=report.method,
        base=model.get("id", ""),
        paper=report.paper,
        headline=headline(report),
        facts={
            "Base model": model.get("id"),
            "Revision": model.get("revision"),
            "Number format": model.get("dtype"),
            "Hash of the unedited weights": model.get("sha256"),
            "Hash of the edit requests": report.requests_sha256,
            "Date": report.created,
        },
        metrics=metrics_table(report, "md") if report.metrics else "",
        edits=report.edits,
        code=apply_python(report) if report.artifact else "",
        commands=apply_commands(report),
        undo=UNDO,
        intended_use=INTENDED_USE,
        caution=CAUTION,
    )
