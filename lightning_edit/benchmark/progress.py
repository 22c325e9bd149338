# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a comparison shows while it runs: one bar over all cells, and nothing of each Trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from lightning.pytorch.utilities import rank_zero_info

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["CellProgress", "cell_progress", "without_remarks"]

_LOGGERS = (
    "lightning.pytorch",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
)


class CellProgress(Protocol):
    """Where cells are told that begin and end."""

    def begin(self, name: str) -> None:
        """A cell begins."""
        ...

    def end(self, name: str, outcome: str) -> None:
        """A cell has ended."""
        ...


@contextmanager
def without_remarks() -> Iterator[None]:
    """Context manager: of Lightning only warnings, as a Trainer a cell would repeat itself."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def cell_progress(total: int, done: int, *, shown: bool) -> Iterator[CellProgress]:
    """Context manager: a bar over cells, where there is a terminal and the package rich.

    Elsewhere lines are logged where a cell begins and where it ends.

    Args:
        total: Cells of the study.
        done: Those that are done already.
        shown: Whether to show anything.
    """
    if shown:
        try:
            from rich.console import Console
        except ImportError:
            yield _Lines(total, done)
            return
        console = Console(stderr=True)
        if not console.is_terminal:
            yield _Lines(total, done)
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            yield _Bar(bar, total, done)
        return
    yield _Silent()


class _Bar:
    def __init__(self, bar: Progress, total: int, done: int) -> None:
        self._bar = bar
        self._task = bar.add_task("cells", total=total, completed=done)

    def begin(self, name: str) -> None:
        self._bar.update(self._task, description=name)

    def end(self, name: str, outcome: str) -> None:
        from rich.text import Text

        self._bar.console.print(Text(f"{name}  {outcome}"))
        self._bar.advance(self._task)


class _Lines:
    def __init__(self, total: int, done: int) -> None:
        self._total, self._done = total, done

    def begin(self, name: str) -> None:
        rank_zero_info(f"{self._done + 1} of {self._total}  {name} …")

    def end(self, name: str, outcome: str) -> None:
        self._done += 1
        rank_zero_info(f"{self._done} of {self._total}  {name}  {outcome}")


class _Silent:
    def begin(self, name: str) -> None:
        """Nothing."""

    def end(self, name: str, outcome: str) -> None:
        """Nothing."""
