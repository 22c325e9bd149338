# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The page is sound HTML, fetches nothing, escapes everything and says what it draws."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import files

import pytest

from lightning_edit.report import EditRow, MetricRow, RunReport, render_html
from lightning_edit.report.svg import metric_bar, sequence_chart, sequence_series
from lightning_edit.report.view import mark_answers
from tests.report.sample import ATTACK, CONTROLS, HOSTILE, PAPER, Page, hostile, sample

CSS = files("lightning_edit.report").joinpath("templates/page.css").read_text(encoding="utf-8")


def test_nothing_is_fetched_or_run() -> None:
    page = Page(render_html(sample()))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    references = [
        (tag, name, value)
        for tag, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "data") or name[:2] == "on"
    ]
    assert references == [("a", "href", PAPER)]
    assert "url(" not in CSS
    assert "@import" not in CSS
    assert {"http-equiv", "content"} <= set(page.named("meta")[1])


@pytest.mark.parametrize("paper", ["javascript:alert(1)", 'https://x" onclick="y', "Meng 2022"])
def test_only_addresses_become_links(paper: str) -> None:
    page = Page(render_html(replace(sample(), paper=paper)))
    assert page.named("a") == []
    assert paper in page.text


def test_text_is_escaped_everywhere() -> None:
    seen = HOSTILE.replace(CONTROLS, r"␀␛\x9b\u202e")
    text = render_html(hostile())
    page = Page(text)
    assert "<script" not in text
    assert not set(CONTROLS) & set(text)
    assert page.text.count(seen) >= 30
    assert {name for _, attributes in page.elements for name in attributes} <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "id", "title", "dir", "open",
        "aria-label", "aria-labelledby", "aria-hidden", "role", "scope", "rowspan", "tabindex",
        "style", "type", "value", "checked", "width", "height", "viewbox", "x", "y", "x1", "x2",
        "y1", "y2", "d", "rx", "r", "cx", "cy", "text-anchor", "data-series",
    }  # fmt: skip


def test_it_reads_aloud() -> None:
    page = Page(render_html(sample()))
    assert all(cell.get("scope") for cell in page.named("th"))
    for picture in page.named("svg"):
        assert picture.get("aria-hidden") or (picture["role"] == "img" and picture["aria-label"])
    labels = [picture.get("aria-label") for picture in page.named("svg")]
    assert "before 0 %, after 66.7 %, 95 % interval 21 % to 94 %" in labels
    assert "h.9.mlp.weight 2 (2 % of ‖W‖) h.10.mlp.weight 1 (" in " ".join(page.text.split())
    badges = [b["aria-label"] for b in page.named("span") if "badge" in (b.get("class") or "")]
    assert badges == [
        *("new answer given", "right", "unchanged"),
        *("new answer missing", "right", "changed"),
        *("new answer given", "right", "unchanged"),
    ]
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for a in page.named("section")} <= set(ids)


def test_it_says_what_is_known() -> None:
    text = Page(render_html(sample())).text
    for fact in (
        "2 of 3 facts were changed; 2 of 3 neighboring answers stayed as they were.",
        "Here teacher forcing flatters the edits by 33.3 percentage points.",
        f"What does {ATTACK} do?",
        "日本の首都は",
        "21 % – 94 %",
        "delta.revert_(model)",
        "1,234,567",
        "a" * 64,
        "solver.ridge",
        "3 GiB",
        "1 without the new answer",
        "1 with a changed neighbor",
    ):
        assert fact in text


def test_what_is_unknown_is_a_dash_or_absent() -> None:
    page = Page(render_html(sample()))
    start = page.text.index("Portability (one hop)")
    cells = "|".join(page.text[start:].split("\n"))
    assert re.match(r"Portability \(one hop\)\|autoregressive\|–\|–\|+–\|0\|", cells)
    assert not re.search(r"\b(nan|None|inf)\b", page.text)
    bare = Page(render_html(RunReport(method="IKE", artifact="")))
    headings = [a["aria-labelledby"] for a in bare.named("section")]
    assert headings == ["undo", "reproduce"]
    assert "delta" not in bare.text


def test_a_long_run_is_cut_with_a_remark() -> None:
    failed = {"reliability/autoregressive": 0.0}
    edits = [EditRow(str(i), f"prompt {i}.") for i in range(250)]
    edits[249] = replace(edits[249], after=failed)
    page = Page(render_html(RunReport(method="ROME", edits=edits)))
    shown = [a for a in page.named("details") if (a.get("class") or "").startswith("edit")]
    assert len(shown) == 200
    assert "prompt 249." in page.text
    assert "prompt 199." not in page.text
    assert "200 of 250 edits are shown, failed ones first" in page.text


def test_a_bar_by_hand() -> None:
    # 190 units wide from 5: 0.5 lies at 5 + 95 = 100, 0.25 at 52.5, 0.75 at 147.5.
    svg = metric_bar(MetricRow(before=0.0, after=0.5, n=10, ci=(0.25, 0.75)))
    assert '<rect class="after" x="5" y="3" width="95.00" height="10" rx="2"/>' in svg
    assert '<path class="whisker" d="M52.5 18.5H147.5M52.5 16V21M147.5 16V21"/>' in svg
    assert '<path class="before" d="M5 0V16"/>' in svg
    empty = metric_bar(MetricRow())
    assert 'class="after"' not in empty
    assert 'class="before"' not in empty
    assert 'aria-label="before –, after –"' in empty


def test_layer_bars_are_in_proportion() -> None:
    layers: dict[str, dict[str, float | None]] = {
        "a": {"norm": 2.0, "relative_norm": 0.02},
        "b": {"norm": 1.0, "relative_norm": None},
        "c": {"norm": None, "relative_norm": None},
    }
    text = render_html(replace(sample(), layers=layers))
    assert re.findall(r'class="length" style="width:([0-9.]+)%"', text) == ["100", "50", "0"]
    assert ".length { min-width: 1px;" in CSS  # a trace of a bar, so that its place is seen
    assert "2 (2 % of ‖W‖)" in text
    nothing = render_html(replace(sample(), layers={"c": {"norm": None}}))
    assert re.findall(r'class="length" style="width:([0-9.]+)%"', nothing) == ["0"]


def test_a_curve_by_hand() -> None:
    series = sequence_series(sample())
    assert series == {"reliability/autoregressive": [(1, 1.0), (3, 0.5)], "retention": [(1, 1.0)]}
    svg = sequence_chart(series)
    # From x = 56 to 980 - 16 = 964; y = 12 at 1, and 12 + 244 / 2 = 134 at 0.5.
    assert '<path class="line series0" d="M56 12L964 134"/>' in svg
    assert "Reliability, autoregressive: 100 % after 1 edits, 50 % after 3" in svg


def test_answers_are_marked_whole() -> None:
    def marked(text: str, new: str, old: str | None) -> str:
        pieces = mark_answers(text, EditRow("a", "p", target_new=new, target_old=old))
        return "".join(f"{kind}({piece})" if kind else piece for kind, piece in pieces)

    assert marked(" York City, not york; Yorker\n", "York", "York City") == (
        "old(York City), not new(york); Yorker"
    )
    assert marked("Rome", "Rome", "rome") == "new(Rome)"
    assert marked("text", "", None) == "text"
    assert marked(" ", "x", None) == ""
    assert marked("首都は京都です", "京都", None) == "首都はnew(京都)です"
    assert marked("a.b axb", "a.b", "") == "new(a.b) axb"
    edit = EditRow("a", "<p>", target_new="<b>", after_text=" a <b> & <i>")
    page = render_html(RunReport(method="ROME", edits=[edit]))
    assert 'a <mark class="new">&lt;b&gt;</mark> &amp; &lt;i&gt;</blockquote>' in page


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colors_have_contrast(scheme: int) -> None:
    """Text has at least 4.5 : 1 and graphics 3 : 1 (WCAG 2.1, 1.4.3 and 1.4.11)."""
    colors = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", CSS.split(":root {")[1 + scheme]))

    def luminance(name: str) -> float:
        channels = [int(colors[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for ink in ("ink", "quiet", "bad", "after"):
        for ground in ("card", "page", "code"):
            assert contrast(ink, ground) >= 4.5
    assert contrast("new-ink", "new") >= 4.5
    assert contrast("old-ink", "old") >= 4.5
    for line in ("before", "c0", "c1", "c2", "c3", "c4", "c5"):
        assert contrast(line, "card") >= 3
