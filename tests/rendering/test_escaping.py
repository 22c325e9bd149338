# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""No text from outside steers a terminal, breaks out of its place or is read backwards."""

from __future__ import annotations

import re
import unicodedata

import pytest

from lightning_edit.rendering.escaping import (
    code_block,
    code_span,
    escape_markdown,
    is_web_address,
    visible,
)


def test_every_control_character_is_shown() -> None:
    # By Unicode: Cc are the controls; Bidi_Control are the marks, embeddings and isolates.
    everything = [chr(i) for i in range(0x3000)]
    controls = [c for c in everything if unicodedata.category(c) == "Cc" and c not in "\t\n"]
    marks = {"\u061c", "\u200e", "\u200f"}
    kinds = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    bidi = [c for c in everything if c in marks or unicodedata.bidirectional(c) in kinds]
    assert (len(controls), len(bidi)) == (63, 12)
    for char in (*controls, *bidi):
        shown = visible(f"a{char}b")
        assert char not in shown, hex(ord(char))
        assert re.fullmatch(r"a(.|\\x[0-9a-f]{2}|\\u[0-9a-f]{4})b", shown)
    for text in ("a\tb\nc", "京都, Zürich, עברית, العربية", "half \ud83d"):
        assert visible(text) == text
    assert visible("a\r\nb\rc") == "a\nb␍c"


@pytest.mark.parametrize("text", ["a`b", "``", "`a", "a|b", "plain", "```"])
def test_code_is_closed_by_its_own_fence(text: str) -> None:
    span = code_span(text)
    fence = re.match("`+", span)
    assert fence is not None
    inner = span[len(fence[0]) : -len(fence[0])]
    assert fence[0] not in re.findall("`+", inner)
    assert inner.strip().replace("\\|", "|") == text
    block = code_block(f"{text}\n````\nx", "python").split("\n")
    assert block[0] == "`````python"
    assert block[-1] == "`````"


def test_code_has_no_line_breaks_in_a_line() -> None:
    assert code_span("a\n\n# b") == "`a ↵ # b`"


def test_markdown_is_text() -> None:
    assert escape_markdown("<b>[x](y)</b> 1 \x1b") == r"&lt;b&gt;\[x\](y)&lt;/b&gt; 1 ␛"


@pytest.mark.parametrize(
    "text", ["javascript:x", "https://a b", "https://a\u202eb", "https://a\x9bb", "https://a>b", ""]
)
def test_what_is_no_address_of_a_link(text: str) -> None:
    assert not is_web_address(text)
