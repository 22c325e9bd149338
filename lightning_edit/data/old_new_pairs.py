# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Pairs of an old and a new answer to one instruction: for forgetting before learning.

The form is that of F-Learning (Ni et al., ACL 2024, arXiv:2311.08011): alpaca-style records.
"""

from __future__ import annotations

from lightning_edit.core.request import EditRequest
from lightning_edit.data.base import EditDataModule
from lightning_edit.data.records import (
    Record,
    optional_text,
    probe_if,
    question_of,
    text,
    texts,
)

__all__ = ["OldNewPairs", "old_new_pair_from_record"]


def old_new_pair_from_record(record: Record, where: str) -> EditRequest:
    """Reads one record.

    Its fields are ``instruction``, ``subject``, ``output_old``, ``output_new``, and perhaps ``id``,
    ``input`` (follows the instruction on a line of its own), ``rephrase``, ``loc``, ``loc_ans``.

    Args:
        record: The record.
        where: Names the file and record in errors.

    Raises:
        RequestError: If a field is missing or no text, or the subject is not in the prompt.

    Examples:
        >>> request = old_new_pair_from_record({"id": 2, "instruction": "Where does Ada live?",
        ...     "subject": "Ada", "output_old": "London", "output_new": "Rome"}, "pairs.json[0]")
        >>> request.id, request.target_old, request.target_new
        ('pair-2', 'London', 'Rome')
    """
    instruction = text(record, "instruction", where)
    further = optional_text(record, "input", where)
    loc = question_of(optional_text(record, "loc", where))
    number = record.get("id")
    return EditRequest.from_dict(
        {
            "prompt": instruction if further is None else f"{instruction}\n{further}",
            "subject": text(record, "subject", where),
            "target_new": text(record, "output_new", where),
            "target_old": text(record, "output_old", where),
            "rephrases": texts(record, "rephrase", where),
            "locality": probe_if(loc, optional_text(record, "loc_ans", where), "unrelated"),
            "id": "" if number is None else f"pair-{number}",
        },
        where,
    )


class OldNewPairs(EditDataModule):
    """Old and new answers (the form of F-Learning).

    ``requests`` ask for the new answers, ``old_requests`` for the old ones; so they do in every
    data set that names old answers.

    Takes the arguments of [`EditDataModule`][lightning_edit.EditDataModule].
    """

    def to_requests(self, record: Record, where: str) -> list[EditRequest]:
        """Turns one record into its request."""
        return [old_new_pair_from_record(record, where)]
