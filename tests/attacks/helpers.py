# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What the tests of attacks share: flipped bits, and interrupts at every line of some files."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

__all__ = ["flipped", "interrupted_at", "lines_of"]


def flipped(data: bytes, number: int) -> list[int]:
    """Places of bits to flip, the same in every run: all of them where there are few."""
    count = len(data) * 8
    return random.Random(0).sample(range(count), min(number, count))  # noqa: S311 - a test


def interrupted_at(line: int, files: Collection[str], call: Callable[[], object]) -> int:
    """Calls a function that is interrupted at a line.

    Args:
        line: Counted from 1 over all lines that are run in the files; 0 for none.
        files: Names of the files.
        call: The function.

    Returns:
        How many lines were run.
    """
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            lines += 1
            if lines == line:
                raise KeyboardInterrupt
        return trace

    kept = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(kept)
    return lines


def lines_of(files: Collection[str], call: Callable[[], object]) -> int:
    """How many lines of some files a function runs."""
    return interrupted_at(0, files, call)
