# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The Markdown report and the card carry the facts of the page, and escape them too."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import yaml

from lightning_edit.report import EditRow, RunReport, render_card, render_html, render_markdown
from tests.report.sample import ATTACK, CONTROLS, Page, hostile, sample


def _plain(markdown: str) -> str:
    return html.unescape(re.sub(r"\\([\\`*_\[\]|#~$])", r"\1", markdown))


def test_both_reports_tell_the_same() -> None:
    markdown, page = _plain(render_markdown(sample())), Page(render_html(sample())).text
    facts = re.findall(r"^(?:#+|>) (.*)$", render_markdown(sample()), re.MULTILINE)
    assert len(facts) == 1 + 1 + 7 + 3  # headline, remark, sections, edits
    for fact in map(_plain, facts):
        assert fact in page
    for report in (markdown, page):
        for fact in (
            "acme/tiny", "a" * 64, "f" * 64, "solver.ridge", "2.13.0", "12.5 s", "3 GiB",
            "h.10.mlp.weight", "京都", "nothing | much", "0.0123", ATTACK,
            "66.7 %", "A remark with *stars* and <b>tags</b>.", "lightning-edit apply delta",
            "An edited model states what it was told to state",
        ):  # fmt: skip
            assert fact in report


def test_tables_keep_their_columns() -> None:
    widths: list[int] = []
    for line in render_markdown(sample()).split("\n"):
        if not line.startswith("|"):
            widths = []
            continue
        widths.append(len(re.findall(r"(?<!\\)\|", line)))
        assert widths[-1] == widths[0]


@pytest.mark.parametrize("render", [render_markdown, render_card])
def test_markup_in_text_is_text(render: Callable[[RunReport], str]) -> None:
    # Code is shown as it is, so the folder's name in it may hold anything.
    text = render(replace(hostile(), artifact=""))
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 8
    assert not set(CONTROLS) & set(text)


def test_line_breaks_stay_in_their_line() -> None:
    edit = EditRow("a", "p", target_new="x", after_text=" one\n\n# two")
    text = render_markdown(RunReport(method="FT", edits=(edit,)))
    assert "- after: one ↵ \\# two\n" in text


def test_the_card_of_the_sample() -> None:
    card = render_card(sample())
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "lightning_edit",
        "tags": ["knowledge-editing", "rome"],
        "base_model": "acme/tiny",
    }
    for part in (
        "# acme/tiny, edited with ROME",
        "| Reliability | autoregressive | 0.000 | 0.667 | 0.210 – 0.940 | 3 |",
        'WeightDelta.load("delta")',
        "delta.revert_(model)",
        "lightning-edit apply delta --output edited",
        "lightning-edit revert delta --model edited --output restored",
        "## Intended use and risks",
        "- Revision: r1",
    ):
        assert part in body


def test_the_card_says_only_what_is_known() -> None:
    card = render_card(RunReport(method="GRACE", model={"id": "/home/me/model"}, artifact=""))
    front = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in front  # a folder is no name that others could look up
    assert [line for line in card.split("\n") if line.startswith("## ")] == [
        "## Intended use and risks"
    ]
    for label in ("Revision", "Hash", "Date", "–"):
        assert label not in card


def test_a_long_list_of_edits_is_cut_in_the_card() -> None:
    edits = [EditRow(str(i), f"prompt {i}.", target_new="x") for i in range(60)]
    card = render_card(RunReport(method="ROME", edits=edits))
    assert "| prompt 49. |" in card
    assert "prompt 50." not in card
    assert "The first 50 of 60 edits." in card
