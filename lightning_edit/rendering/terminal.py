# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Output where a terminal has few characters, such as those of ASCII or of code page 1252."""

from __future__ import annotations

import codecs
from typing import TextIO

__all__ = ["spell_out"]

_SPELLED = {
    "‖": "|",
    "Δ": "d",
    "↵": "/",
    "→": "->",
    "…": "...",
    "–": "-",
    "—": "-",
    "−": "-",
    "×": "x",
    "±": "+-",
    "≤": "<=",
    "≥": ">=",
}


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    known = (_SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost)
    return "".join(known), error.end


codecs.register_error("lightning_edit.spelled", _spelled)


def spell_out(*streams: TextIO) -> None:
    r"""Has streams write what their encoding lacks in its own characters, instead of failing.

    Signs of formulas become letters, and all others escapes. A stream that was told what to do with
    such characters, or that is none of a terminal or a file, stays as it is.

    Args:
        streams: Such as ``sys.stdout``.

    Examples:
        >>> import io
        >>> stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        >>> spell_out(stream)
        >>> stream.write("‖Δ‖ é") and stream.flush()
        >>> stream.buffer.getvalue()
        b'|d| \\xe9'
    """
    for stream in streams:
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and stream.errors in ("strict", "surrogateescape"):
            reconfigure(errors="lightning_edit.spelled")
