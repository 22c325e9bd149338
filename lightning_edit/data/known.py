# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Known1000: facts that GPT-2 XL completes rightly, for finding where a model keeps its facts.

Meng et al., NeurIPS 2022 (arXiv:2202.05262), section 2.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from lightning_edit.core.request import EditRequest
from lightning_edit.data.base import EditDataModule
from lightning_edit.data.records import Record, optional_text, text

__all__ = ["Known1000", "known_from_record"]


def known_from_record(record: Record, where: str) -> EditRequest:
    """Reads one record: ``known_id, subject, prompt, attribute`` and perhaps ``target_new``.

    Without ``target_new`` the request states the fact itself: that is what locating it needs.

    Args:
        record: The record.
        where: Names the file and record in errors.

    Raises:
        RequestError: If a field is missing or no text, or the subject is not in the prompt.

    Examples:
        >>> request = known_from_record({"known_id": 3, "subject": "Ada", "attribute": "London",
        ...                              "prompt": "Ada was born in"}, "known.json[0]")
        >>> request.id, request.target_new, request.target_old
        ('known-3', 'London', None)
    """
    attribute = text(record, "attribute", where)
    target = optional_text(record, "target_new", where)
    number = record.get("known_id")
    return EditRequest.from_dict(
        {
            "prompt": text(record, "prompt", where),
            "subject": text(record, "subject", where),
            "target_new": target or attribute,
            "target_old": attribute if target else None,
            "id": "" if number is None else f"known-{number}",
        },
        where,
    )


class Known1000(EditDataModule):
    """Facts of the form "subject, relation, attribute" (Known1000).

    The data set names no false answers. As edits, each fact takes over the attribute of the next
    record of its relation that has another one (after the last record comes the first): the same
    choice every time, and an answer of the right type. A fact whose relation has no other attribute
    is left out.

    Args:
        counterfactual: Whether to ask for another attribute. If not, each request states the fact
            itself, for locating.
        kwargs: Arguments of [`EditDataModule`][lightning_edit.EditDataModule].
    """

    def __init__(self, counterfactual: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.counterfactual = counterfactual

    def read_records(self) -> list[tuple[str, Record]]:
        """Reads the records, with a ``target_new`` added to each if edits are wanted."""
        records = super().read_records()
        if not self.counterfactual:
            return records
        relations: defaultdict[str, list[str]] = defaultdict(list)
        places: list[tuple[list[str], int]] = []
        for where, record in records:
            attributes = relations[text(record, "relation_id", where)]
            places.append((attributes, len(attributes)))
            attributes.append(text(record, "attribute", where))
        targeted: list[tuple[str, Record]] = []
        for (where, record), (attributes, place) in zip(records, places, strict=True):
            following = attributes[place + 1 :] + attributes[:place]
            target = next((a for a in following if a != record["attribute"]), None)
            if target is not None:
                targeted.append((where, {**record, "target_new": target}))
        return targeted

    def to_requests(self, record: Record, where: str) -> list[EditRequest]:
        """Turns one record into its request."""
        return [known_from_record(record, where)]
