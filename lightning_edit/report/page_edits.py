# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The edits of a report in HTML: one line each, which opens to the texts, probes and scores."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_edit.report.glossary import metric_name, sort_metrics
from lightning_edit.report.markup import escape, highlight, scroll, section
from lightning_edit.report.results import EditRow, ProbeRow
from lightning_edit.report.summary import ROLES, probe_passed, role_outcome, select_edits, success
from lightning_edit.report.text import DASH, duration, flatten, number, percent

__all__ = ["edit_list"]

_VERDICTS = {True: ("good", "✓"), False: ("bad", "✗"), None: ("unknown", DASH)}


def edit_list(edits: Sequence[EditRow]) -> str:
    """The section of the edits; empty where there are none."""
    if not edits:
        return ""
    shown, remark = select_edits(edits)
    note = f"Open a line for the texts before and after, and the questions beside it. {remark}"
    missed = sum(_missed(edit) for edit in shown)
    moved = sum(_moved(edit) for edit in shown)
    choices = [("all", f"all {len(shown)}")]
    choices += [("missed", f"{missed} without the new answer")] if missed else []
    choices += [("moved", f"{moved} with a changed neighbor")] if moved else []
    filters = ""
    if len(choices) > 1 and len(shown) > 1:
        buttons = "".join(
            f'<label><input type="radio" name="show" value="{value}"'
            f"{' checked' if value == 'all' else ''}> {escape(label)}</label>"
            for value, label in choices
        )
        filters = f'<fieldset class="filters"><legend>Show</legend>{buttons}</fieldset>'
    body = "\n".join(_edit(edit, is_open=len(shown) == 1) for edit in shown)
    return section(
        "edits", "Edit by edit", f'<p class="quiet">{escape(note.strip())}</p>{filters}\n{body}\n'
    )


def _missed(edit: EditRow) -> bool:
    return success(edit)[0] is False


def _moved(edit: EditRow) -> bool:
    return any(p.role == "locality" and p.unchanged is False for p in edit.probes)


def _edit(edit: EditRow, *, is_open: bool) -> str:
    verdict, _ = success(edit)
    css = " ".join(["edit"] + ["missed"] * _missed(edit) + ["moved"] * _moved(edit))
    old = (
        f'<span class="old" dir="auto">{escape(edit.target_old)}</span>' if edit.target_old else ""
    )
    words = {True: "new answer given", False: "new answer missing", None: "not measured"}[verdict]
    chips = []
    for role, word in ROLES.items():
        outcome = role_outcome(edit.probes, role)
        if outcome is not None:
            css_chip = "" if outcome.hits == outcome.total else " short"
            chips.append(
                f'<span class="chip{css_chip}">{word} {outcome.hits}/{outcome.total}</span>'
            )
    return (
        f'<details class="{css}"{" open" if is_open else ""}><summary>{_badge(verdict, words)}'
        f'<span class="prompt" dir="auto">{escape(edit.prompt)}</span>'
        f'<span class="targets">{old}<span class="arrow" role="img" aria-label="becomes"> → </span>'
        f'<span class="new" dir="auto">{escape(edit.target_new)}</span></span>'
        f'<span class="chips">{"".join(chips)}</span></summary>\n<div class="inside">'
        f"{_texts(edit)}{_probes(edit)}{_scores(edit)}{_numbers(edit)}</div></details>"
    )


def _badge(verdict: bool | None, words: str) -> str:
    css, sign = _VERDICTS[verdict]
    return f'<span class="badge {css}" role="img" aria-label="{escape(words)}">{sign}</span>'


def _texts(edit: EditRow) -> str:
    if not (edit.before_text or edit.after_text):
        return ""
    blocks = []
    for title, text in (("Before", edit.before_text), ("After", edit.after_text)):
        marked = highlight(text.strip(), new=edit.target_new, old=edit.target_old)
        blocks.append(
            f'<figure><figcaption>{title}</figcaption><blockquote dir="auto">'
            f'<span class="prompt">{escape(edit.prompt)}</span> {marked or DASH}'
            "</blockquote></figure>"
        )
    return f'<div class="texts">{"".join(blocks)}</div>'


def _probes(edit: EditRow) -> str:
    if not edit.probes:
        return ""
    rows = "".join(_probe(probe, edit) for probe in edit.probes)
    columns = ("", "Question", "Right answer", "Before", "After")
    head = "".join(
        f'<th scope="col">{c or "<span class=hidden>Outcome</span>"}</th>' for c in columns
    )
    return scroll(
        '<table class="probes"><caption>Questions beside the edit</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>",
        "Questions beside the edit",
    )


def _probe(probe: ProbeRow, edit: EditRow) -> str:
    verdict = probe_passed(probe)
    if probe.role == "locality":
        words = {True: "unchanged", False: "changed", None: "not measured"}[verdict]
    else:
        words = {True: "right", False: "wrong", None: "not measured"}[verdict]
    kind = ", ".join(filter(None, (probe.role, probe.kind.replace("_", " "))))
    forced = ""
    if probe.teacher_forced is not None:
        forced = f'<span class="quiet">teacher-forced {percent(probe.teacher_forced)}</span>'
    before, after = (
        highlight(text.strip(), new=edit.target_new, old=edit.target_old) or DASH
        for text in (probe.before_text, probe.after_text)
    )
    return (
        f'<tr><td>{_badge(verdict, words)}</td><th scope="row"><span dir="auto">'
        f'{escape(probe.prompt)}</span><span class="quiet">{escape(kind)}</span></th>'
        f'<td><div dir="auto">{escape(probe.answer) or DASH}</div></td>'
        f'<td><div dir="auto">{before}</div></td>'
        f'<td><div dir="auto">{after}</div>{forced}</td></tr>'
    )


def _scores(edit: EditRow) -> str:
    keys = sort_metrics({**edit.before, **edit.after})
    if not keys:
        return ""
    rows = []
    for key in keys:
        name = metric_name(key)
        show = percent if name.is_rate else number
        label = ", ".join(filter(None, (name.label, name.reading_label)))
        rows.append(
            f'<tr><th scope="row">{escape(label)}</th>'
            f'<td class="num">{escape(show(edit.before.get(key)))}</td>'
            f'<td class="num">{escape(show(edit.after.get(key)))}</td></tr>'
        )
    return (
        '<table class="scores"><caption>Scores of this edit</caption><thead><tr>'
        '<th scope="col">Metric</th><th scope="col" class="num">Before</th>'
        f'<th scope="col" class="num">After</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _numbers(edit: EditRow) -> str:
    entries = {"id": edit.id}
    if edit.subject:
        entries["subject"] = edit.subject
    if edit.norm is not None:
        entries["‖Δ‖"] = number(edit.norm)
    if edit.relative_norm is not None:
        entries["‖Δ‖/‖W‖"] = number(edit.relative_norm)
    if edit.seconds is not None:
        entries["time"] = duration(edit.seconds)
    for name, value in flatten(edit.diagnostics):
        entries[name] = _diagnostic(value)
    items = "".join(
        f'<div><dt>{escape(name)}</dt><dd dir="auto">{escape(value)}</dd></div>'
        for name, value in entries.items()
    )
    return f'<dl class="numbers">{items}</dl>'


def _diagnostic(text: str) -> str:
    try:
        return number(float(text))
    except ValueError:
        return text
