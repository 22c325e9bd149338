# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""QAEdit: questions of three question-answering data sets, for evaluation as in use.

Yang et al., "The Mirage of Model Editing", ACL 2025 (arXiv:2502.11177); from Natural Questions,
TriviaQA and SimpleQA.
"""

from __future__ import annotations

from lightning_edit.core.errors import RequestError
from lightning_edit.core.request import EditRequest, Probe
from lightning_edit.data.base import EditDataModule
from lightning_edit.data.records import Record, optional_text, text, texts

__all__ = ["QAEdit", "qaedit_from_record"]


def qaedit_from_record(record: Record, where: str) -> EditRequest:
    """Reads one record.

    Its fields are ``prompt``, ``subject``, ``target``, and perhaps ``id``, ``source``, ``rephrase``
    and ``locality``, questions that are ``unrelated``. Old answers are not given.

    Args:
        record: The record.
        where: Names the file and record in errors.

    Raises:
        RequestError: If a field is missing or no text, or the subject is not in the prompt.

    Examples:
        >>> request = qaedit_from_record({"id": 5, "source": "NQ", "prompt": "who wrote emma",
        ...     "subject": "emma", "target": "Jane Austen",
        ...     "locality": [{"loc": "who sang skyfall", "loc_ans": "Adele"}]}, "qaedit.json[0]")
        >>> request.id, request.locality[0].kind
        ('qaedit-NQ-5', 'unrelated')
    """
    locality = record.get("locality") or []
    if not isinstance(locality, list):
        raise RequestError(f"{where}: `locality` is expected to be a list of probes.")
    probes = []
    for i, item in enumerate(locality):
        place = f"{where}, locality[{i}]"
        answer = optional_text(item, "loc_ans", place) or ""
        probes.append(Probe(text(item, "loc", place), answer, "unrelated"))
    # Each of the three sources counts for itself.
    source, number = optional_text(record, "source", where) or "any", record.get("id")
    return EditRequest.from_dict(
        {
            "prompt": text(record, "prompt", where),
            "subject": text(record, "subject", where),
            "target_new": text(record, "target", where),
            "rephrases": texts(record, "rephrase", where),
            "locality": probes,
            "id": "" if number is None else f"qaedit-{source}-{number}",
        },
        where,
    )


class QAEdit(EditDataModule):
    """Questions of everyday question answering (QAEdit).

    Takes the arguments of [`EditDataModule`][lightning_edit.EditDataModule].
    """

    def to_requests(self, record: Record, where: str) -> list[EditRequest]:
        """Turns one record into its request."""
        return [qaedit_from_record(record, where)]
