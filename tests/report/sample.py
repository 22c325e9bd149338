# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A small run with everything in it, whose counts are easily made by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from html.parser import HTMLParser

from lightning_edit.report import EditRow, MetricRow, ProbeRow, RunReport

ATTACK = "<script>alert('x')</script>"
CONTROLS = "\x00\x1b\x9b\u202e"
HOSTILE = f"{ATTACK}\"'>&amp;{CONTROLS}"
PAPER = "https://arxiv.org/abs/2202.05262"

# Void elements of HTML and the childless shapes of SVG, which close themselves.
_VOID = {"meta", "input", "br", "rect", "line", "path", "circle"}


def sample() -> RunReport:
    """Three edits, of which the second failed and moved a neighbor."""
    return RunReport(
        method="ROME",
        paper=PAPER,
        settings={"layers": [5], "solver": {"ridge": 0.1}, "clamp": None},
        model={
            "id": "acme/tiny",
            "revision": "r1",
            "dtype": "float32",
            "sha256": "f" * 64,
            "parameters": 1234567,
        },
        requests_sha256="a" * 64,
        metrics={
            "reliability/teacher_forced": MetricRow(0.0, 1.0, 3, (0.44, 1.0)),
            "reliability/autoregressive": MetricRow(0.0, 2 / 3, 3, (0.21, 0.94)),
            "locality/teacher_forced": MetricRow(1.0, 0.9, 4, (0.5, 0.99)),
            "locality/kl": MetricRow(0.0, 0.0312, 4),
            "portability/one_hop/autoregressive": MetricRow(None, math.nan, 0),
        },
        edits=[
            _edit("a", "The capital of France is", "Rome", "Paris", hit=True),
            _edit("b", f"What does {ATTACK} do?", "nothing | much", "run & crash", hit=False),
            _edit("c", "日本の首都は", "京都", "東京", hit=True),
        ],
        layers={
            "h.10.mlp.weight": {"norm": 1.0, "relative_norm": 0.01},
            "h.9.mlp.weight": {"norm": 2.0, "relative_norm": 0.02},
        },
        versions={"lightning_edit": "0.1.0", "torch": "2.13.0"},
        seconds={"total": 12.5, "edit": 0.5},
        peak_memory_bytes=3 * 2**30,
        sequence=(
            {"edits": 1, "reliability/autoregressive": 1.0, "retention": 1.0},
            {"edits": 3, "reliability/autoregressive": 0.5, "retention": None},
        ),
        notes=("A remark with *stars* and <b>tags</b>.",),
        created="2025-06-01",
    )


def _edit(name: str, prompt: str, new: str, old: str, *, hit: bool) -> EditRow:
    said = new if hit else old
    probes = [
        ProbeRow("generality", "rephrase", f"Say: {prompt}", new, old, new, 1.0, True),
        ProbeRow(
            "locality",
            "neighborhood",
            "Spain's capital is",
            "Madrid",
            "Madrid.",
            "Madrid." if hit else "Rome.",
            unchanged=hit,
        ),
    ]
    return EditRow(
        id=name,
        prompt=prompt,
        subject="it",
        target_new=new,
        target_old=old,
        before_text=f" {old}. Nothing else.",
        after_text=f" {said}.\nA second line.",
        before={"reliability/autoregressive": 0.0},
        after={"reliability/autoregressive": float(hit), "reliability/teacher_forced": 1.0},
        norm=2.5,
        relative_norm=0.004,
        seconds=0.25,
        diagnostics={"loss": 0.0123, "steps": 20},
        probes=probes,
    )


def hostile() -> RunReport:
    """A run with markup in every text that comes from outside."""
    evil = HOSTILE
    probe = ProbeRow(evil, evil, evil, evil, evil, evil)
    edit = EditRow(evil, evil, evil, evil, evil, f"{evil} {evil}", f"{evil} {evil}")
    edit = replace(edit, before={evil: 0.0}, diagnostics={evil: evil}, probes=[probe])
    other = replace(edit, target_new="a", target_old="b", before_text=f"{evil} a {evil}")
    rate = MetricRow(0, 1, 1)
    return RunReport(
        method=evil,
        paper=evil,
        settings={evil: evil},
        model={"id": evil},
        requests_sha256=evil,
        metrics={
            f"{evil}/{evil}": rate,
            evil: rate,
            f"portability/{evil}/teacher_forced": rate,
            f"portability/{evil}/autoregressive": rate,
        },
        edits=[edit, other],
        layers={evil: {"norm": 1.0}},
        versions={evil: evil},
        seconds={evil: 1.0},
        sequence=[{f"reliability/{evil}": 1.0, evil: evil}],
        notes=[evil],
        created=evil,
        artifact=evil,
    )


class Page(HTMLParser):
    """Reads a page strictly: every element must be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def named(self, *tags: str) -> list[dict[str, str | None]]:
        """Attributes of all elements of some kinds."""
        return [attributes for tag, attributes in self.elements if tag in tags]
