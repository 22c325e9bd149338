# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""MQuAKE: edits judged by questions that need several facts.

Zhong et al., EMNLP 2023 (arXiv:2305.14795).
"""

from __future__ import annotations

from typing import Any

from lightning_edit.core.errors import RequestError
from lightning_edit.core.request import EditRequest, Probe
from lightning_edit.data.base import EditDataModule
from lightning_edit.data.records import Record, optional_text, text, texts

__all__ = ["MQuAKE", "mquake_from_record"]


def mquake_from_record(record: Record, where: str) -> list[EditRequest]:
    """Reads one case: an edit for each of its ``requested_rewrite``.

    The question of a rewrite is its rephrase. The questions over several hops are probes of the
    *last* edit (kind ``one_hop``, with the aliases of the new answer), for they hold only when all
    edits of the case have been made.

    Args:
        record: The case.
        where: Names the file and record in errors.

    Raises:
        RequestError: If a field is missing or no text, or a subject is not in its prompt.

    Examples:
        >>> first, last = mquake_from_record({"case_id": 1, "requested_rewrite": [
        ...     {"prompt": "{} lives in", "subject": "Ada", "target_new": {"str": "Italy"},
        ...      "target_true": {"str": "England"}, "question": "Where does Ada live?"},
        ...     {"prompt": "The capital of {} is", "subject": "Italy",
        ...      "target_new": {"str": "Bari"}, "target_true": {"str": "Rome"}}],
        ...     "questions": ["What is the capital of Ada's country?"], "new_answer": "Bari",
        ...     "new_answer_alias": []}, "mquake.json[0]")
        >>> first.id, last.id, len(first.portability), len(last.portability)
        ('mquake-1-0', 'mquake-1-1', 0, 1)
    """
    rewrites = record.get("requested_rewrite")
    if not isinstance(rewrites, list) or not rewrites:
        raise RequestError(
            f"{where}: `requested_rewrite` is expected to be a list of edits, but got {rewrites!r}."
        )
    answer = text(record, "new_answer", where)
    aliases = tuple(texts(record, "new_answer_alias", where))
    questions = texts(record, "questions", where)
    case = record.get("case_id")
    requests = []
    for i, rewrite in enumerate(rewrites):
        place = f"{where}, requested_rewrite[{i}]"
        question = optional_text(rewrite, "question", place)
        is_last = i == len(rewrites) - 1
        fields = {
            "prompt": text(rewrite, "prompt", place),
            "subject": text(rewrite, "subject", place),
            "target_new": text(rewrite, "target_new.str", place),
            "target_old": text(rewrite, "target_true.str", place),
            "rephrases": [question] if question else [],
            "portability": [Probe(q, answer, "one_hop", aliases) for q in questions]
            if is_last
            else [],
            "id": "" if case is None else f"mquake-{case}-{i}",
        }
        requests.append(EditRequest.from_dict(fields, place))
    return requests


class MQuAKE(EditDataModule):
    """Edits and questions over several hops (MQuAKE).

    Cases with several edits need a protocol under which all of them stay in the model (``batch``,
    ``sequential``); for one that restores the model after each edit set ``max_edits`` to 1.

    Args:
        max_edits: Keep the cases with at most this many edits; all of them when null.
        kwargs: Arguments of [`EditDataModule`][lightning_edit.EditDataModule]; they count edits,
            not cases.
    """

    def __init__(self, max_edits: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_edits = max_edits

    def to_requests(self, record: Record, where: str) -> list[EditRequest]:
        """Turns one case into its requests, or into none if it has too many."""
        requests = mquake_from_record(record, where)
        return requests if self.max_edits is None or len(requests) <= self.max_edits else []
