# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Which tests `make test` leaves to `make test-long`.

Continuous integration runs both. `long.txt` names tests that take seconds; of one that is asked for
many cases, the first stays in `make test`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

__all__ = ["mark_long"]

#: Lines of `long.txt`: a file or a test, and `*` behind a test of which no case stays.
LONG = frozenset((Path(__file__).parent / "long.txt").read_text(encoding="utf-8").split())


def mark_long(items: list[pytest.Item]) -> None:
    """Marks the tests that are left to `make test-long`."""
    seen: set[str] = set()
    for item in items:
        test, bracket, _ = item.nodeid.partition("[")
        is_first = bool(bracket) and test not in seen
        seen.add(test)
        file = test.partition("::")[0]
        is_whole = file in LONG or f"{test}*" in LONG
        if is_whole or (test in LONG and not is_first):
            item.add_marker(pytest.mark.long)
