# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The card of a run (``README.md``): what the edited model is, how to use it, how to undo it."""

from __future__ import annotations

import json
import re

from lightning_edit.report.markdown import code_lines
from lightning_edit.report.results import RunReport
from lightning_edit.report.summary import headline
from lightning_edit.report.table import escape_markdown, metrics_table
from lightning_edit.report.text import is_web_address
from lightning_edit.report.undo import CAUTION, INTENDED_USE, UNDO, apply_commands, apply_python

__all__ = ["render_card"]

MAX_EDITS = 50  # in the card; the report has them all


def render_card(report: RunReport) -> str:
    """The model card of a run: only what is known, nothing left to fill in.

    Examples:
        >>> card = render_card(RunReport(method="ROME", model={"id": "gpt2"}))
        >>> card.split("---")[1].split()
        ['library_name:', 'lightning_edit', 'tags:', '-', 'knowledge-editing', '-', '"rome"',
         'base_model:', '"gpt2"']
    """
    model = str(report.model.get("id") or "")
    lines = [
        *_front_matter(report, model),
        "",
        f"# {escape_markdown(model) or 'A language model'}, edited with "
        f"{escape_markdown(report.method)}",
        "",
        headline(report),
        "",
        _about(report),
        "",
    ]
    if report.metrics:
        lines += [
            "## Results",
            "",
            metrics_table(report, "md"),
            "",
            "*Autoregressive*: as the model writes by itself, the reading to expect in use. "
            "*Teacher-forced*: with the right answer so far at hand, comparable with most papers. "
            "What each word means, and every edit with its texts, is in `report.html` and "
            "`report.md`; the numbers are in `results.json` and `edits.jsonl`.",
            "",
        ]
    if report.edits:
        lines += ["## Edits", "", "| prompt | old answer | new answer |", "|---|---|---|"]
        lines += [
            f"| {escape_markdown(edit.prompt)} | {escape_markdown(edit.target_old or '–')} | "
            f"{escape_markdown(edit.target_new)} |"
            for edit in report.edits[:MAX_EDITS]
        ]
        if len(report.edits) > MAX_EDITS:
            lines += ["", f"The first {MAX_EDITS} of {len(report.edits)} edits."]
        lines.append("")
    if report.artifact:
        lines += [
            "## Load, apply, undo",
            "",
            *code_lines(apply_python(report), "python"),
            "",
            UNDO,
            "",
        ]
        if commands := apply_commands(report):
            lines += ["Or from the command line:", "", *code_lines(commands, "bash"), ""]
    lines += ["## Intended use and risks", "", INTENDED_USE, "", CAUTION, ""]
    return "\n".join(lines)


def _front_matter(report: RunReport, model: str) -> list[str]:
    # A JSON string is a YAML string, whatever characters it holds.
    method = re.sub(r"[^a-z0-9]+", "-", report.method.lower()).strip("-")
    lines = ["---", "library_name: lightning_edit", "tags:", "- knowledge-editing"]
    if method:
        lines.append(f"- {json.dumps(method)}")
    if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):  # a name on the hub, not a folder
        lines.append(f"base_model: {json.dumps(model)}")
    return [*lines, "---"]


def _about(report: RunReport) -> str:
    facts = [f"Method: {escape_markdown(report.method)}"]
    if report.paper:
        paper = report.paper
        facts[0] += f" (<{paper}>)" if is_web_address(paper) else f" ({escape_markdown(paper)})"
    names = {
        "id": "Base model",
        "revision": "Revision",
        "dtype": "Number format",
        "sha256": "Hash of the unedited weights",
    }
    facts += [
        f"{label}: {escape_markdown(str(report.model[key]))}"
        for key, label in names.items()
        if report.model.get(key)
    ]
    if report.requests_sha256:
        facts.append(f"Hash of the edit requests: {escape_markdown(report.requests_sha256)}")
    if report.created:
        facts.append(f"Date: {escape_markdown(report.created)}")
    return "\n".join(f"- {fact}" for fact in facts)
