# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""MQuAKE: edits judged by questions that need several facts.

Zhong et al., EMNLP 2023 (arXiv:2305.14795).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_edit.core.errors import RequestError
from lightning_edit.core.request import EditRequest, Probe
from lightning_edit.data.base import EditDataModule
from lightning_edit.data.records import Record, optional_text, text, texts

__all__ = ["MQuAKE", "mquake_from_record"]


def mquake_from_record(record: Record, where: str) -> list[EditRequest]:
    """Reads one case: an edit for each of its ``requested_rewrite``.

    The question of a rewrite is its rephrase. The questions over several hops are probes of the
    *last* edit (kind ``multi_hop``, with the aliases of the new answer), for they hold only when
    all edits of the case have been made, and so are the facts of the new chain
    (``new_single_hops``, kind ``single_hop``), edited and not.

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
        >>> first.case == last.case
        True
    """
    rewrites = record.get("requested_rewrite")
    if not isinstance(rewrites, list) or not rewrites:
        raise RequestError(
            f"{where}: `requested_rewrite` is expected to be a list of edits, but got {rewrites!r}."
        )
    answer = text(record, "new_answer", where)
    aliases = tuple(texts(record, "new_answer_alias", where))
    questions = texts(record, "questions", where)
    probes = [*_single_hops(record, where)]
    probes += [Probe(question, answer, "multi_hop", aliases) for question in questions]
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
            "portability": probes if is_last else [],
            "id": "" if case is None else f"mquake-{case}-{i}",
            "case": next(iter(questions), "") if case is None else f"mquake-{case}",
        }
        requests.append(EditRequest.from_dict(fields, place))
    return requests


def _single_hops(record: Record, where: str) -> Iterator[Probe]:
    hops = record.get("new_single_hops") or []
    if not isinstance(hops, list):
        raise RequestError(
            f"{where}: `new_single_hops` is expected to be a list of facts, but got {hops!r:.80}."
        )
    for i, hop in enumerate(hops):
        place = f"{where}, new_single_hops[{i}]"
        aliases = tuple(texts(hop, "answer_alias", place))
        yield Probe(text(hop, "question", place), text(hop, "answer", place), "single_hop", aliases)


class MQuAKE(EditDataModule):
    """Edits and questions over several hops (MQuAKE).

    The edits of a case stay together: under ``test_protocol="batch"`` with an ``eval_batch_size``
    of 1 each case is one edit, as in the paper; under ``independent`` its edits are made one after
    another.

    Args:
        max_edits: Keep the cases with at most this many edits; all of them when null.
        kwargs: Arguments of [`EditDataModule`][lightning_edit.EditDataModule].
    """

    def __init__(self, max_edits: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_edits = max_edits

    def to_requests(self, record: Record, where: str) -> list[EditRequest]:
        """Turns one case into its requests, or into none if it has too many."""
        requests = mquake_from_record(record, where)
        return requests if self.max_edits is None or len(requests) <= self.max_edits else []
