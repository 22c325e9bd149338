# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Requests that say the same, or the contrary, of the same thing."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_edit.core.request import EditRequest
from lightning_edit.ledger.history import Standing

__all__ = ["Conflict", "conflicts_among", "conflicts_with"]


@dataclass(frozen=True)
class Conflict:
    """Two requests about one thing: the same subject in the same words.

    Args:
        request: The one that is asked for.
        other: The one that it meets.
        entry: Row of the ledger with the other; None where both are asked for together.
        is_contradiction: Whether they ask for different answers; else the second is a duplicate.
    """

    request: EditRequest
    other: EditRequest
    entry: int | None
    is_contradiction: bool

    def __str__(self) -> str:
        where = "" if self.entry is None else f" of row {self.entry} of the ledger"
        verb = "contradicts" if self.is_contradiction else "says the same as"
        return (
            f"Request {self.request.id!r} ({self.request.prompt!r} → "
            f"{self.request.target_new!r}) {verb} {self.other.id!r}{where} "
            f"({self.other.prompt!r} → {self.other.target_new!r})."
        )


def conflicts_among(requests: Sequence[EditRequest]) -> list[Conflict]:
    """Conflicts of requests with earlier ones of the same set.

    Args:
        requests: The requests, in order.

    Examples:
        >>> asked = [("The capital of {} is", "Rome"), ("the capital  of {} is:", "Lyon")]
        >>> rows = [EditRequest(p, "France", target) for p, target in asked]
        >>> [conflict.is_contradiction for conflict in conflicts_among(rows)]
        [True]
    """
    found, known = list[Conflict](), dict[tuple[str, str], EditRequest]()
    for request in requests:
        other = known.get(_thing(request))
        if other is not None:
            found.append(Conflict(request, other, None, _differ(request, other)))
        known[_thing(request)] = request
    return found


def conflicts_with(requests: Iterable[EditRequest], standing: Sequence[Standing]) -> list[Conflict]:
    """Conflicts of requests with edits that are in the model.

    Args:
        requests: The requests.
        standing: The edits, of which a later one takes the place of an earlier one.
    """
    known = {_thing(r): (r, one.entry.id) for one in standing for r in one.requests}
    pairs = [(request, known[_thing(request)]) for request in requests if _thing(request) in known]
    return [
        Conflict(request, other, number, _differ(request, other))
        for request, (other, number) in pairs
    ]


def _thing(request: EditRequest) -> tuple[str, str]:
    """What a request is about: its subject, and the words around that."""
    prompt, subject = request.prompt, request.subject
    if subject:
        start = request.subject_start
        start = prompt.index(subject) if start is None else start
        prompt = f"{prompt[:start]}{{}}{prompt[start + len(subject) :]}"
    return _folded(subject), _folded(prompt).rstrip(" .:?!…。：？！")


def _differ(one: EditRequest, other: EditRequest) -> bool:
    return _folded(one.target_new).rstrip(" .") != _folded(other.target_new).rstrip(" .")


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
