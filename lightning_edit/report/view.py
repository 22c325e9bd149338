# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What both forms of a report for people show, as their templates ask for it."""

from __future__ import annotations

import re
from itertools import groupby

from lightning_edit.rendering.templates import render
from lightning_edit.report.glossary import MetricName, Term, metric_name, sort_metrics
from lightning_edit.report.results import EditRow, MetricRow, ProbeRow, RunReport
from lightning_edit.report.summary import (
    MIRAGE,
    gap_sentence,
    gaps,
    headline,
    probe_passed,
    select_edits,
    success,
)
from lightning_edit.report.text import byte_count, duration, flatten, natural_key, number, percent
from lightning_edit.report.undo import CAUTION, INTENDED_USE, UNDO, apply_commands, apply_python

__all__ = ["layer_rows", "mark_answers", "render_report"]


def render_report(template: str, report: RunReport, **more: object) -> str:
    """Fills in a template of the report.

    Args:
        template: Its name in ``report/templates``.
        report: The run.
        more: What this template alone needs.

    Examples:
        >>> page = render_report("undo.html", RunReport(method="ROME"))
        >>> "bit for bit" in page
        True
    """
    keys = sort_metrics(report.metrics)
    edits, remark = select_edits(report.edits)
    found = gaps(report)
    page = render(
        __package__,
        template,
        report=report,
        model=report.model.get("id") or "",
        headline=headline(report),
        unit="steps" if any("step" in point for point in report.sequence) else "edits",
        metrics=_metrics(report, keys),
        terms=_terms([metric_name(key) for key in keys]),
        gaps=found,
        gap_sentence=gap_sentence(found),
        mirage=MIRAGE,
        edits=edits,
        remark=remark,
        layers=layer_rows(report),
        code=apply_python(report),
        commands=apply_commands(report),
        undo=UNDO,
        intended_use=INTENDED_USE,
        caution=CAUTION,
        circumstances=_circumstances(report),
        number=number,
        percent=percent,
        success=success,
        probe_passed=probe_passed,
        probe_kind=_probe_kind,
        edit_facts=_edit_facts,
        edit_scores=_edit_scores,
        mark_answers=mark_answers,
        **more,
    )
    return str(page)


def mark_answers(text: str, edit: EditRow) -> list[tuple[str, str]]:
    """A text in pieces: the answers of an edit in it, whatever their case, and what is between.

    Args:
        text: What a model said; space around it is dropped.
        edit: The edit, with its new and old answer.

    Returns:
        Kind and piece; the kind is ``new`` or ``old``, and empty between the answers.

    Examples:
        >>> edit = EditRow("a", "p", target_new="Rome", target_old="Paris")
        >>> mark_answers("Romeo: rome, not Paris", edit)
        [('', 'Romeo: '), ('new', 'rome'), ('', ', not '), ('old', 'Paris')]
    """
    kinds = {(edit.target_old or "").strip().lower(): "old", edit.target_new.strip().lower(): "new"}
    words = sorted(filter(None, kinds), key=len, reverse=True)
    text, pieces, end = text.strip(), [], 0
    if words:
        # Only Latin words have boundaries to respect: Chinese and Japanese write without spaces.
        pattern = "|".join(re.escape(word) for word in words)
        whole = re.compile(f"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", re.IGNORECASE)
        for match in whole.finditer(text):
            pieces.append(("", text[end : match.start()]))
            pieces.append((kinds.get(match[0].lower(), "new"), match[0]))
            end = match.end()
    pieces.append(("", text[end:]))
    return [(kind, piece) for kind, piece in pieces if piece]


def _metrics(report: RunReport, keys: list[str]) -> list[list[tuple[MetricName, MetricRow]]]:
    """The rows of the table of metrics, those of one metric together."""
    rows = [(metric_name(key), report.metrics[key]) for key in keys]
    return [list(group) for _, group in groupby(rows, key=lambda row: row[0].label)]


def _terms(names: list[MetricName]) -> list[Term]:
    """The metrics and readings of a table, each once."""
    terms = [name.term for name in names] + [name.reading_term for name in names]
    return [term for term in dict.fromkeys(terms) if term]


def layer_rows(report: RunReport) -> list[tuple[str, float | None, float | None]]:
    """Parameter, ‖Δ‖ and ‖Δ‖ / ‖W‖, in the order of the layers."""
    entries = sorted(report.layers.items(), key=lambda item: natural_key(item[0]))
    return [(name, entry.get("norm"), entry.get("relative_norm")) for name, entry in entries]


def _probe_kind(probe: ProbeRow) -> str:
    return ", ".join(filter(None, (probe.role, probe.kind.replace("_", " "))))


def _edit_facts(edit: EditRow) -> dict[str, str]:
    """What is known of an edit beside its texts and scores."""
    entries = {"id": edit.id, "subject": edit.subject}
    entries["‖Δ‖"] = "" if edit.norm is None else number(edit.norm)
    entries["‖Δ‖/‖W‖"] = "" if edit.relative_norm is None else number(edit.relative_norm)
    entries["time"] = "" if edit.seconds is None else duration(edit.seconds)
    entries |= {name: _figure(value) for name, value in flatten(edit.diagnostics)}
    return {name: value for name, value in entries.items() if value}


def _figure(text: str) -> str:
    try:
        return number(float(text))
    except ValueError:
        return text


def _edit_scores(edit: EditRow) -> list[tuple[str, str, str]]:
    """Metric with its reading, and its value before and after."""
    rows = []
    for key in sort_metrics({**edit.before, **edit.after}):
        name = metric_name(key)
        show = percent if name.is_rate else number
        rows.append((name.full_label, show(edit.before.get(key)), show(edit.after.get(key))))
    return rows


def _circumstances(report: RunReport) -> dict[str, dict[str, str]]:
    """Tables of what it takes to make the run again."""
    run = {
        "method": report.method,
        "paper": report.paper,
        "created": report.created,
        "requests sha256": report.requests_sha256,
    }
    model = {k: f"{v:,}" if k == "parameters" and v else v for k, v in report.model.items()}
    costs = {name: duration(value) for name, value in report.seconds.items()}
    if report.peak_memory_bytes is not None:
        costs["peak memory"] = byte_count(report.peak_memory_bytes)
    tables = {
        "Run": {name: value for name, value in run.items() if value},
        "Model": {name: str(v) for name, v in model.items() if v not in (None, "", 0)},
        "Settings": dict(flatten(report.settings)),
        "Versions": dict(report.versions),
        "Time and memory": costs,
    }
    return {title: entries for title, entries in tables.items() if entries}
