# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Numbers and strings as people read them; what is not known is a dash."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping

__all__ = [
    "DASH",
    "byte_count",
    "duration",
    "flatten",
    "interval",
    "natural_key",
    "number",
    "percent",
]

DASH = "–"


def number(value: float | None, digits: int | None = None) -> str:
    """A number with a fixed count of decimals, or with three significant digits.

    Examples:
        >>> number(0.5, 3), number(0.004123), number(12345.6), number(None)
        ('0.500', '0.00412', '12346', '–')
    """
    if value is None or not math.isfinite(value):
        return DASH
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share in [0, 1] in percent; only a full share reads 100 %, only an empty one 0 %.

    Examples:
        >>> percent(0.5), percent(0.975), percent(1.0), percent(0.9999), percent(None)
        ('50 %', '97.5 %', '100 %', '> 99.9 %', '–')
    """
    if share is None or not math.isfinite(share):
        return DASH
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{round(100 * share, 1):g} %"


def interval(ci: tuple[float, float] | None, digits: int | None = None) -> str:
    """Both ends of an interval.

    Examples:
        >>> interval((0.25, 1.0), 2), interval(None)
        ('0.25 – 1.00', '–')
    """
    return DASH if ci is None else f"{number(ci[0], digits)} – {number(ci[1], digits)}"


def duration(seconds: float | None) -> str:
    """A time span.

    Examples:
        >>> duration(0.0123), duration(12.34), duration(3725), duration(None)
        ('0.0123 s', '12.3 s', '1 h 2 min 5 s', '–')
    """
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min {rest} s" if hours else f"{minutes} min {rest} s"


def byte_count(count: int | None) -> str:
    """A number of bytes in binary units.

    Examples:
        >>> byte_count(512), byte_count(3 * 2**30), byte_count(None)
        ('512 B', '3 GiB', '–')
    """
    if count is None:
        return DASH
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts ``layers.10`` behind ``layers.9``.

    Examples:
        >>> sorted(["h.10.w", "h.9.w", "e"], key=natural_key)
        ['e', 'h.9.w', 'h.10.w']
    """
    parts = re.split(r"([0-9]+)", name)
    return tuple((1, int(p), "") if p.isdecimal() else (0, 0, p) for p in parts)


def flatten(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and JSON values.

    Examples:
        >>> list(flatten({"layers": [5], "solver": {"ridge": 0.1}}))
        [('layers', '[5]'), ('solver.ridge', '0.1')]
    """
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{name}", text
