# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Texts that come from outside, made harmless where they are shown."""

from __future__ import annotations

import re

from markupsafe import Markup

__all__ = [
    "code_block",
    "code_span",
    "escape_latex",
    "escape_markdown",
    "is_web_address",
    "visible",
]

# Control characters would vanish, break the file or steer a terminal; their pictures, and for those
# without a picture their numbers, say that they are there.
_HARMLESS: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"},
    127: "␡",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
}
# Unicode's Bidi_Control: they let a text be read in another order than it has.
_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_HARMLESS |= {code: f"\\u{code:04x}" for code in _BIDI}

_LATEX = {char: f"\\{char}" for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "–": "--",
}


def visible(text: object) -> str:
    r"""Text with its control characters (but tab and newline) replaced by what can be seen.

    These are those of ASCII, C1 and the ones that change the direction of writing.

    Examples:
        >>> visible("a\x00b\x1b[0m")
        'a␀b␛[0m'
        >>> print(visible("\x9b0m \u202eemoR"))
        \x9b0m \u202eemoR
    """
    return str(text).replace("\r\n", "\n").translate(_HARMLESS)


def escape_markdown(text: object) -> str:
    r"""Makes a text safe inside a line or table cell of Markdown; line breaks become ``↵``.

    Examples:
        >>> escape_markdown("a|b <i>\n*c*")
        'a\\|b &lt;i&gt; ↵ \\*c\\*'
    """
    shown = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = "".join(f"\\{char}" if char in "\\`*_[]|#~$" else char for char in shown)
    return re.sub(r"\s*\n\s*", " ↵ ", escaped)


def escape_latex(text: object) -> str:
    r"""Makes a text safe in a line or table cell of LaTeX.

    Examples:
        >>> escape_latex("95 % of a_b")
        '95 \\% of a\\_b'
    """
    line = re.sub(r"\s*\n\s*", " ", visible(text))
    return "".join(_LATEX.get(char, char) for char in line)


def code_span(text: object) -> Markup:
    r"""A text as code inside a line or table cell of Markdown, whatever it holds.

    Examples:
        >>> print(code_span("h.0.mlp"), code_span("a`b"))
        `h.0.mlp` `` a`b ``
    """
    line = re.sub(r"\s*\n\s*", " ↵ ", visible(text)).replace("|", "\\|")
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") or len(fence) > 1 else ""
    return Markup(f"{fence}{space}{line}{space}{fence}")  # noqa: S704 - code is shown as it is


def code_block(text: object, language: str = "") -> Markup:
    r"""Lines of code in Markdown, fenced by more backticks than any line of them has.

    Examples:
        >>> print(code_block("x = 1", "python"))
        ```python
        x = 1
        ```
    """
    code = visible(text)
    fence = "`" * max(3, _longest_run(code) + 1)
    return Markup(f"{fence}{language}\n{code}\n{fence}")  # noqa: S704 - code is shown as it is


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def is_web_address(text: str) -> bool:
    """Whether a text may stand as the target of a link.

    Examples:
        >>> is_web_address("https://arxiv.org/abs/2202.05262"), is_web_address("javascript:x")
        (True, False)
    """
    return visible(text) == text and bool(re.fullmatch(r"https?://[^\s<>\"'()]+", text))
