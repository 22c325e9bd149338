# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Where running text has white space: between a prompt and its answer, and around words."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["continues_word", "is_inside_word", "space_between", "word_starts"]

# Full-width forms, Han, kana and bopomofo: not even numbers and quotes are set apart.
_EAST_ASIAN = (
    "\u3000-\u3130\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uff9f\uffe0-\uffee"
    "\U00020000-\U0003ffff"
)
_IS_EAST_ASIAN = re.compile(f"[{_EAST_ASIAN}]")
# With Thai to Tibetan and Burmese, and Khmer, which have spaces around numbers and sentences.
_UNSPACED = re.compile(f"[\u0e00-\u109f\u1780-\u17ff{_EAST_ASIAN}]")
# Korean has spaces, but attaches particles to the word.
_HANGUL = re.compile("[\u1100-\u11ff\ua960-\ua97f\uac00-\ud7ff]")
# Closing punctuation, but neither `.NET` nor `:8080`.
_CLOSES = re.compile(
    r"[.,:;!?…،؛؟।](?!\w)|[、。，．：；！？｡､]|['’](?:s|t|re|ve|m|ll|d)(?![\w-])", re.I
)
_DASHES = "-‐‑–—−"
# Quotes that open in some languages and close in others, with what they then belong to.
_PARTNERS = {"“": "„", "‘": "‚", "«": "»", "‹": "›"}


def space_between(text: str, more: str, glued: bool | None = None) -> str:
    """The white space to put between two pieces of running text: one space or none.

    There is none where white space stands already; before closing punctuation; after an opening
    bracket or quote, a hyphen, a slash, and a sign of a currency before its amount; and where the
    script is written without spaces. Chinese and Japanese set Latin words apart here, but neither
    numbers nor punctuation.

    Args:
        text: What comes first.
        more: What follows it.
        glued: Says that there is no space (True), or that there is one (False), whatever the rule.

    Examples:
        >>> space_between("The capital of France is", "Paris"), space_between("首都は", "東京")
        (' ', '')
        >>> [space_between(*pair) for pair in (("It costs $", "5"), ("人口是", "14亿"))]
        ['', '']
        >>> space_between("He lives in New", "castle", glued=True)
        ''
    """
    if not text or not more or text[-1].isspace() or more[0].isspace():
        return ""
    if glued is None:
        glued = _closes(text, more) or _opens(text, more) or _is_unspaced(text, more)
    return "" if glued else " "


def continues_word(text: str, more: str) -> bool:
    """Whether two pieces, put together without a space, make one word of a spaced script.

    Examples:
        >>> continues_word("New", "castle"), continues_word("is ", "Rome")
        (True, False)
    """
    before, after = text[-1:], more[:1]
    if after and unicodedata.category(after)[0] == "M":
        return bool(before) and not before.isspace()
    joins = (c.isalnum() and not _UNSPACED.match(c) for c in (before, after))
    return all(joins) and not (_HANGUL.match(before) or _HANGUL.match(after))


def is_inside_word(text: str, start: int, length: int) -> bool:
    """Whether a part of a text begins or ends within a word."""
    end = start + length
    return continues_word(text[:start], text[start:]) or continues_word(text[:end], text[end:])


def word_starts(text: str, word: str) -> list[int]:
    """Where a word stands in a text and is no part of another word.

    Examples:
        >>> word_starts("In Indiana, India is", "India")
        [12]
    """
    found = (match.start() for match in re.finditer(re.escape(word), text))
    return [start for start in found if not is_inside_word(text, start, len(word))]


def _closes(text: str, more: str) -> bool:
    """Whether the second piece begins with what is put right behind a word."""
    first, rest = more[0], more[1:]
    if _CLOSES.match(more) or unicodedata.category(first) == "Pe":
        return True
    if first in "%‰":
        return text[-1].isdigit() and not rest[:1].isalnum()
    # A closing quote opens in Swedish and Danish.
    is_last = not any(unicodedata.category(c) in ("Pi", "Pf") for c in rest)
    return unicodedata.category(first) == "Pf" and is_last


def _opens(text: str, more: str) -> bool:
    """Whether the first piece ends with what is put right before a word."""
    mark, before = text[-1], text[:-1]
    kind = unicodedata.category(mark)
    if kind == "Ps" or mark in "/\\¿¡":
        return True
    if kind == "Sc":  # before the amount, and not behind it
        return not before.rstrip()[-1:].isdigit()
    if mark in _DASHES:
        word = text.rstrip(_DASHES)
        is_minus = mark in "-−" and len(word) == len(before) and more[0].isdigit()
        return is_minus or not (not word or word[-1].isspace())
    return (kind in ("Pi", "Pf") or mark in "\"'`") and _opens_quote(mark, before)


def _opens_quote(mark: str, before: str) -> bool:
    """Whether a quote opens, by what stands before it."""
    last = before[-1:]
    is_free = not last or last.isspace() or unicodedata.category(last) in ("Ps", "Pi", "Pd")
    is_east_asian = bool(_IS_EAST_ASIAN.match(last))
    if mark in _PARTNERS:
        closes = last.isalnum() or before.rfind(_PARTNERS[mark]) > before.rfind(mark)
        return is_east_asian or not closes
    if unicodedata.category(mark) == "Pf":
        opener = next((a for a, b in _PARTNERS.items() if b == mark), "“" if mark == "”" else "‘")
        return is_free and before.rfind(opener) <= before.rfind(mark)
    if is_free:
        return True
    if (mark == "'" and not is_east_asian) or last in ".,;!?" or last.isdigit():
        return False  # or an apostrophe, or inches
    return before.count(mark) % 2 == 0


def _is_unspaced(text: str, more: str) -> bool:
    """Whether the scripts at the seam have no space there."""
    last, first = text[-1], more[0]
    if _UNSPACED.match(first):
        return bool(_UNSPACED.search(text))
    if not _IS_EAST_ASIAN.match(last):
        return False
    return not (first.isalpha() and last.isalnum())
