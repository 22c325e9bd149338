# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Small pieces of HTML that the page is put together from; all text passes through here."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping

from lightning_edit.rendering.escaping import visible

__all__ = ["code_block", "escape", "facts", "highlight", "scroll", "section"]


def escape(text: object) -> str:
    """Makes a text safe for element content and quoted attributes.

    Examples:
        >>> escape('<b title="x">')
        '&lt;b title=&quot;x&quot;&gt;'
    """
    return html.escape(visible(text), quote=True)


def highlight(text: str, *, new: str, old: str | None) -> str:
    """Escapes a text and marks the new and the old answer in it, whatever their case.

    Examples:
        >>> highlight("Rome, not Paris <3", new="Rome", old="Paris")
        '<mark class="new">Rome</mark>, not <mark class="old">Paris</mark> &lt;3'
        >>> highlight("Romeo", new="Rome", old=None)
        'Romeo'
    """
    answers = {new.strip().lower(): "new"}
    answers = {(old or "").strip().lower(): "old"} | answers
    words = sorted((answer for answer in answers if answer), key=len, reverse=True)
    if not words:
        return escape(text)
    # Only Latin words have boundaries to respect: Chinese and Japanese write without spaces.
    pattern = "|".join(re.escape(word) for word in words)
    parts, end = [], 0
    for match in re.finditer(f"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", text, re.IGNORECASE):
        kind = answers.get(match[0].lower(), "new")
        parts += [
            escape(text[end : match.start()]),
            f'<mark class="{kind}">{escape(match[0])}</mark>',
        ]
        end = match.end()
    return "".join([*parts, escape(text[end:])])


def section(name: str, title: str, body: str) -> str:
    """A titled section of the page; the body is HTML."""
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>\n{body}</section>'
    )


def scroll(body: str, label: str) -> str:
    """Lets a wide table or picture scroll by itself on a narrow screen; the body is HTML."""
    return (
        f'<div class="scroll" role="group" aria-label="{escape(label)}" tabindex="0">{body}</div>'
    )


def code_block(text: str) -> str:
    """Lines of code, as they are."""
    return f"<pre><code>{escape(text)}</code></pre>"


def facts(title: str, entries: Mapping[str, object]) -> str:
    """A two-column table of names and values."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td dir="auto">{escape(value)}</td></tr>'
        for name, value in entries.items()
    )
    return f'<table class="facts"><caption>{escape(title)}</caption><tbody>{rows}</tbody></table>'
