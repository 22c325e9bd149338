# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""WikiBigEdit: changes of Wikidata as a long stream of edits.

Thede et al., ICML 2025 (arXiv:2503.05683).
"""

from __future__ import annotations

from lightning_edit.core.request import EditRequest
from lightning_edit.data.base import EditDataModule
from lightning_edit.data.records import Record, optional_text, probe_if, text, texts

__all__ = ["WikiBigEdit", "wikibigedit_from_record"]


def wikibigedit_from_record(record: Record, where: str) -> EditRequest:
    """Reads one record in its flat form.

    Its fields are ``prompt``, ``subject``, ``target_new``, and perhaps ``rephrase_prompt``,
    ``locality_prompt`` and ``locality_ground_truth``. The locality question asks for the same
    relation of a similar subject: ``neighborhood``.

    Args:
        record: The record.
        where: Names the file and record in errors.

    Raises:
        RequestError: If a field is missing or no text, or the subject is not in the prompt.

    Examples:
        >>> request = wikibigedit_from_record({"prompt": "Where is Ada employed?", "subject": "Ada",
        ...     "target_new": "Rome", "locality_prompt": "Where is Tom employed?",
        ...     "locality_ground_truth": "Bath"}, "wikibigedit.json[0]")
        >>> request.locality[0].answer
        'Bath'
    """
    neighbor = optional_text(record, "locality_prompt", where)
    answer = optional_text(record, "locality_ground_truth", where)
    return EditRequest.from_dict(
        {
            "prompt": text(record, "prompt", where),
            "subject": text(record, "subject", where),
            "target_new": text(record, "target_new", where),
            "rephrases": texts(record, "rephrase_prompt", where),
            "locality": probe_if(neighbor, answer, "neighborhood"),
        },
        where,
    )


class WikiBigEdit(EditDataModule):
    """Changes of Wikidata over time (WikiBigEdit).

    Takes the arguments of [`EditDataModule`][lightning_edit.EditDataModule].
    """

    def to_requests(self, record: Record, where: str) -> list[EditRequest]:
        """Turns one record into its request."""
        return [wikibigedit_from_record(record, where)]
