# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Requests that say the same, or the contrary, are known whatever their spelling."""

from __future__ import annotations

from lightning_edit import EditRequest
from lightning_edit.ledger.conflicts import conflicts_among, conflicts_with
from lightning_edit.ledger.entries import Entry
from lightning_edit.ledger.history import Standing

FRANCE = EditRequest("The capital of {} is", "France", "Rome", id="a")


def test_spelling_makes_no_difference() -> None:
    for prompt, subject, target, contradicts in (
        ("The capital of {} is", "France", "Rome", False),
        ("the  Capital of France is", "France", "rome.", False),
        ("The capital of {} is:", "ＦＲＡＮＣＥ", "Lyon", True),
    ):
        other = EditRequest(prompt, subject, target, id="b")
        [found] = conflicts_among([FRANCE, other])
        assert (found.request, found.other, found.entry) == (other, FRANCE, None)
        assert found.is_contradiction == contradicts
        assert ("contradicts" in str(found)) == contradicts


def test_other_things_are_no_conflict() -> None:
    others = [
        EditRequest("The capital of {} is", "Italy", "Lyon"),
        EditRequest("The capital of {} was", "France", "Lyon"),
        EditRequest("The capital of France is", target_new="Lyon"),
    ]
    assert conflicts_among([FRANCE, *others]) == []


def test_of_edits_in_the_model_the_last_one_counts() -> None:
    later = EditRequest("The capital of {} is", "France", "Lyon", id="b")
    standing = [
        Standing(Entry(requests=(FRANCE,), id=4), (FRANCE,)),
        Standing(Entry(requests=(later,), id=7), (later,)),
    ]
    again = EditRequest("The capital of {} is", "France", "Lyon", id="c")
    [found] = conflicts_with([again], standing)
    assert (found.entry, found.is_contradiction) == (7, False)
    assert "of row 7 of the ledger" in str(found)
