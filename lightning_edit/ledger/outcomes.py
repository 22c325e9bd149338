# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a ledger tells: plain data, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_edit.ledger.entries import Entry

__all__ = [
    "Approved",
    "BlameRow",
    "Blamed",
    "Exported",
    "Listed",
    "Problem",
    "UndoPlan",
    "Undone",
    "Verified",
]

#: How an edit is taken out: what it replaced is put back; it is subtracted, by the sum of the
#: others; a memory forgets it; or the others are made again by the editor.
How = Literal["reverted", "added up", "forgotten", "made again"]


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written.

    Args:
        row: Number of the row; 0 for the ledger as a whole.
        what: What is wrong.
    """

    row: int
    what: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.what}" if self.row else self.what


@dataclass(frozen=True)
class UndoPlan:
    """What taking an edit out costs.

    Args:
        entry: Number of its row.
        requests: Ids of the requests that go with it.
        how: ``reverted``: what it replaced is put back, bit for bit. ``added up``: the weights
            become original + the other changes, rounded once. ``forgotten``: a memory forgets it.
            ``made again``: the editor makes all others again, as if it had never been.
        again: Edits that are made again.
        tensors: Parameters or entries that are written.
        nbytes: Bytes of these.
    """

    entry: int
    requests: tuple[str, ...]
    how: How
    again: int
    tensors: int
    nbytes: int

    def __str__(self) -> str:
        again = f"{self.again} edit(s) made again, " if self.again else ""
        return (
            f"edit {self.entry} is {self.how}: {again}{self.tensors} tensor(s) written, "
            f"{self.nbytes:,} bytes"
        )


@dataclass(frozen=True)
class BlameRow:
    """What an edit has to do with an answer.

    Args:
        entry: The edit's row.
        p_without: Probability of the answer without the edit, as the geometric mean of its
            tokens'.
        says: What the model says without the edit.
        is_cause: Whether that is something else, or the probability another one.
    """

    entry: Entry
    p_without: float
    says: str
    is_cause: bool


@dataclass(frozen=True)
class Blamed:
    """Which edits changed the answer to a prompt.

    Args:
        prompt: What was asked.
        answer: What the model says as it stands.
        p: Probability of the answer.
        rows: One for each edit in the model, those that matter most first.
    """

    prompt: str
    answer: str
    p: float
    rows: tuple[BlameRow, ...]

    @property
    def causes(self) -> tuple[int, ...]:
        """Numbers of the edits that changed the answer."""
        return tuple(row.entry.id for row in self.rows if row.is_cause)


@dataclass(frozen=True)
class Listed:
    """Rows of a ledger.

    Args:
        entries: The rows.
        in_full: Whether all of each is to be told.
    """

    entries: Sequence[Entry]
    in_full: bool = False


@dataclass(frozen=True)
class Verified:
    """A ledger in which nothing was changed.

    Args:
        rows: Number of its rows.
        deltas: Number of its saved edits.
        signed: Number of rows that are signed.
        head: Hash of the last row. Whoever keeps it elsewhere can show later that nothing was
            taken away.
    """

    rows: int
    deltas: int
    signed: int
    head: str


@dataclass(frozen=True)
class Undone:
    """Edits that were taken out, or would be.

    Args:
        plans: What it costs, one for each edit.
        entries: The rows that were written; none where it was only asked what it costs.
        folder: The model without the edits.
        fingerprint: Of that model.
    """

    plans: tuple[UndoPlan, ...]
    entries: tuple[Entry, ...] = ()
    folder: Path | None = None
    fingerprint: str = ""


@dataclass(frozen=True)
class Approved:
    """A proposed edit that is kept.

    Args:
        entry: The row that says so.
        folder: The model with the edit.
    """

    entry: Entry
    folder: Path


@dataclass(frozen=True)
class Exported:
    """A file with the rows of a ledger.

    Args:
        path: The file.
        rows: Number of the rows.
    """

    path: Path
    rows: int
