# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The report as Markdown: the same facts as the HTML page, for repositories and terminals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lightning_edit.rendering.escaping import escape_markdown, is_web_address
from lightning_edit.report.glossary import METRICS, READINGS, metric_name, sort_metrics
from lightning_edit.report.results import EditRow, ProbeRow, RunReport
from lightning_edit.report.summary import (
    MIRAGE,
    gap_sentence,
    gaps,
    headline,
    outcomes,
    probe_passed,
    select_edits,
    success,
)
from lightning_edit.report.table import metrics_table
from lightning_edit.report.text import (
    DASH,
    byte_count,
    duration,
    flatten,
    natural_key,
    number,
    percent,
)
from lightning_edit.report.undo import CAUTION, INTENDED_USE, UNDO, apply_commands, apply_python

__all__ = ["code_lines", "render_markdown"]

_VERDICTS = {True: "✓", False: "✗", None: DASH}


def render_markdown(report: RunReport) -> str:
    """The report as one Markdown text.

    Examples:
        >>> edit = EditRow(id="a", prompt="2 * 2 =", target_new="5",
        ...                after={"reliability/autoregressive": 1.0})
        >>> render_markdown(RunReport(method="ROME", edits=[edit])).splitlines()[0]
        '# The fact was changed.'
    """
    lines = [f"# {headline(report)}", "", *_about(report)]
    for metric, outcome in outcomes(report).items():
        lines.append(f"- {METRICS[metric].label}: {outcome.count} ({METRICS[metric].question})")
    lines += [""] + [f"> {escape_markdown(note)}\n" for note in report.notes]
    for title, body in (
        ("What was measured", _metrics(report)),
        ("The mirage gap", _gap(report)),
        ("Edit by edit", _edits(report)),
        ("Over the sequence of edits", _sequence(report)),
        ("Where the weights changed", _layers(report)),
        ("How to apply and undo it" if report.artifact else "Before you use it", _undo(report)),
        ("To reproduce it", list(_reproduce(report))),
    ):
        if body:
            lines += [f"## {title}", "", *body, ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def code_lines(code: str, language: str) -> list[str]:
    """A fenced block of code."""
    return [f"```{language}", *code.split("\n"), "```"]


def _about(report: RunReport) -> list[str]:
    paper = f"<{report.paper}>" if is_web_address(report.paper) else escape_markdown(report.paper)
    facts = [
        f"**{escape_markdown(report.method)}**",
        paper,
        escape_markdown(str(report.model.get("id") or "")),
        escape_markdown(report.created),
    ]
    return [" · ".join(filter(None, facts)), ""]


def _metrics(report: RunReport) -> list[str]:
    if not report.metrics:
        return []
    names = [metric_name(key) for key in sort_metrics(report.metrics)]
    terms = [METRICS[m] for m in dict.fromkeys(n.metric for n in names) if m in METRICS]
    terms += [READINGS[r] for r in dict.fromkeys(n.reading for n in names) if r in READINGS]
    meanings = [f"- **{term.label}**: {term.meaning}" for term in terms]
    return [metrics_table(report, "md"), "", *meanings]


def _gap(report: RunReport) -> list[str]:
    found = gaps(report)
    if not found:
        return []
    rows = [
        f"| {escape_markdown(gap.label)} | {percent(gap.teacher_forced)} | "
        f"{percent(gap.autoregressive)} | {round(100 * gap.value, 1):+g} |"
        for gap in found
    ]
    head = ["| metric | teacher-forced | autoregressive | gap in points |", "|---|--:|--:|--:|"]
    return [" ".join(filter(None, (gap_sentence(found), MIRAGE))), "", *head, *rows]


def _edits(report: RunReport) -> list[str]:
    shown, remark = select_edits(report.edits)
    return [*([remark, ""] if remark else []), *(line for edit in shown for line in _edit(edit))]


def _edit(edit: EditRow) -> Iterator[str]:
    verdict = {True: "✓ changed", False: "✗ not changed", None: f"{DASH} not measured"}
    old = f"{escape_markdown(edit.target_old)} → " if edit.target_old else ""
    yield f"### {escape_markdown(edit.prompt)}"
    yield ""
    yield f"{verdict[success(edit)[0]]}: {old}**{escape_markdown(edit.target_new)}**"
    yield ""
    if edit.before_text or edit.after_text:
        yield f"- before: {_text(edit.before_text)}"
        yield f"- after: {_text(edit.after_text)}"
    numbers = {"id": edit.id, "subject": edit.subject}
    for name, value in (("‖Δ‖", edit.norm), ("‖Δ‖/‖W‖", edit.relative_norm)):
        numbers[name] = number(value) if value is not None else ""
    numbers["time"] = duration(edit.seconds) if edit.seconds is not None else ""
    numbers |= dict(flatten(edit.diagnostics))
    yield "- " + ", ".join(
        f"{escape_markdown(name)} {escape_markdown(value)}"
        for name, value in numbers.items()
        if value
    )
    for key in sort_metrics({**edit.before, **edit.after}):
        metric = metric_name(key)
        show = percent if metric.is_rate else number
        label = ", ".join(filter(None, (metric.label, metric.reading_label)))
        before, after = show(edit.before.get(key)), show(edit.after.get(key))
        yield f"- {escape_markdown(label)}: {before} → {after}"
    yield ""
    if edit.probes:
        yield "| | role | question | right answer | before | after | teacher-forced |"
        yield "|---|---|---|---|---|---|--:|"
        yield from map(_probe, edit.probes)
        yield ""


def _probe(probe: ProbeRow) -> str:
    kind = ", ".join(filter(None, (probe.role, probe.kind.replace("_", " "))))
    cells = (
        _VERDICTS[probe_passed(probe)],
        escape_markdown(kind),
        escape_markdown(probe.prompt),
        _text(probe.answer),
        _text(probe.before_text),
        _text(probe.after_text),
        percent(probe.teacher_forced),
    )
    return f"| {' | '.join(cells)} |"


def _text(text: str) -> str:
    return escape_markdown(text.strip()) or DASH


def _sequence(report: RunReport) -> list[str]:
    if not report.sequence:
        return []
    names = [
        n for n in dict.fromkeys(n for point in report.sequence for n in point) if n != "edits"
    ]
    rows = []
    for i, point in enumerate(report.sequence):
        values = [point.get(name) for name in names]
        shown = [
            number(v, 3) if isinstance(v, float) else str(DASH if v is None else v) for v in values
        ]
        rows.append(
            f"| {' | '.join([str(point.get('edits', i + 1)), *map(escape_markdown, shown)])} |"
        )
    head = " | ".join(["edits made", *map(escape_markdown, names)])
    return [f"| {head} |", f"|{'--:|' * (len(names) + 1)}", *rows]


def _layers(report: RunReport) -> list[str]:
    if not report.layers:
        return []
    rows = [
        f"| {escape_markdown(name)} | {number(entry.get('norm'))} | "
        f"{number(entry.get('relative_norm'))} |"
        for name, entry in sorted(report.layers.items(), key=lambda item: natural_key(item[0]))
    ]
    return ["| parameter | ‖Δ‖ | ‖Δ‖/‖W‖ |", "|---|--:|--:|", *rows]


def _undo(report: RunReport) -> list[str]:
    lines = [INTENDED_USE, "", CAUTION]
    if report.artifact:
        commands = apply_commands(report)
        lines = [
            f"The edit lies in `{report.artifact}/` beside this file. {UNDO}",
            "",
            *code_lines(apply_python(report), "python"),
            "",
            *([*code_lines(commands, "bash"), ""] if commands else []),
            *lines,
        ]
    return lines


def _reproduce(report: RunReport) -> Iterator[str]:
    costs = {f"time: {name}": duration(value) for name, value in report.seconds.items()}
    if report.peak_memory_bytes is not None:
        costs["peak memory"] = byte_count(report.peak_memory_bytes)
    groups: tuple[Mapping[str, object], ...] = (
        {"requests sha256": report.requests_sha256} if report.requests_sha256 else {},
        {f"model {k}": v for k, v in report.model.items() if v not in (None, "", 0)},
        {f"setting {name}": value for name, value in flatten(report.settings)},
        report.versions,
        costs,
    )
    yield "| what | value |"
    yield "|---|---|"
    for group in groups:
        for name, value in group.items():
            yield f"| {escape_markdown(name)} | {escape_markdown(str(value))} |"
