# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""zsRE: questions about relations, in the form that MEND gave them.

Levy et al., CoNLL 2017 (arXiv:1706.04115); as edits De Cao et al., EMNLP 2021 (arXiv:2104.08164)
and Mitchell et al., ICLR 2022 (arXiv:2110.11309); portability Yao et al., EMNLP 2023
(arXiv:2305.13172).
"""

from __future__ import annotations

from typing import Any, Literal

from lightning_edit.core.errors import RequestError
from lightning_edit.core.request import EditRequest, Probe
from lightning_edit.data.base import EditDataModule
from lightning_edit.data.records import (
    Record,
    optional_text,
    probe_if,
    question_of,
    text,
    texts,
)

__all__ = ["ZsRE", "zsre_from_record"]


def zsre_from_record(
    record: Record,
    where: str,
    target_new: Literal["alt", "answers"] = "alt",
    target_old: Literal["answers", "pred"] = "answers",
) -> EditRequest:
    """Reads one record.

    Its fields are ``subject``, ``src``, ``alt``, and perhaps ``rephrase``, ``answers``, ``pred``,
    ``loc`` and ``loc_ans``. The portability files are known by their fields: ``portability`` (one
    hop), ``alter_subject_question`` (subject alias), ``inverse question`` (inverse). Their
    questions follow from ``alt`` and are left out for another target. The Natural Question in
    ``loc`` loses its prefix ``nq question:``.

    Args:
        record: The record.
        where: Names the file and record in errors.
        target_new: Field with the answer to learn.
        target_old: Field with the old answer; unknown where it is missing. If ``answers`` are
            learned, an old answer equal to the new one counts as unknown.

    Raises:
        RequestError: If a field is missing or no text, or the subject is not in the question.

    Examples:
        >>> request = zsre_from_record({
        ...     "subject": "Ada", "src": "Where was Ada born?", "rephrase": "Ada's place of birth?",
        ...     "alt": "Rome", "answers": ["London"], "loc": "nq question: who sang skyfall",
        ...     "loc_ans": "Adele"}, "zsre.json[0]")
        >>> request.target_old, request.target_new, request.locality[0].prompt
        ('London', 'Rome', 'who sang skyfall')
    """
    if not (targets := texts(record, target_new, where)):
        raise RequestError(f"{where}: the field `{target_new}` is missing or empty.")
    new = targets[0]
    old = next(iter(texts(record, target_old, where)), None)
    if target_new == "answers" and old == new:
        old = None
    loc = question_of(optional_text(record, "loc", where))
    rephrase = optional_text(record, "rephrase", where)
    case = record.get("case_id")
    return EditRequest.from_dict(
        {
            "prompt": text(record, "src", where),
            "subject": text(record, "subject", where),
            "target_new": new,
            "target_old": old,
            "rephrases": [rephrase] if rephrase else [],
            "locality": probe_if(loc, optional_text(record, "loc_ans", where), "unrelated"),
            "portability": _portability(record, where) if target_new == "alt" else (),
            "id": "" if case is None else f"zsre-{case}",
        },
        where,
    )


def _portability(record: Record, where: str) -> tuple[Probe, ...]:
    probes: list[Probe] = []
    if record.get("portability"):
        question = text(record, "portability.New Question", where)
        probes.append(Probe(question, text(record, "portability.New Answer", where), "one_hop"))
    if alias := optional_text(record, "alter_subject_question", where):
        probes.append(Probe(alias, text(record, "alt", where), "subject_alias"))
    if inverse := optional_text(record, "inverse question", where):
        probes.append(Probe(inverse, text(record, "subject", where), "inverse"))
    return tuple(probes)


class ZsRE(EditDataModule):
    """Questions with a new answer (zsRE in the form of MEND, with its portability files).

    Args:
        target_new: The answer to learn: ``alt``, as in most of the literature, or the first of
            ``answers``, as in the experiments of ROME and MEMIT.
        target_old: The old answer: the first of ``answers`` (the truth), or ``pred`` (what the
            original model answered), which F-Learning forgets.
        kwargs: Arguments of [`EditDataModule`][lightning_edit.EditDataModule].
    """

    def __init__(
        self,
        target_new: Literal["alt", "answers"] = "alt",
        target_old: Literal["answers", "pred"] = "answers",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.target_new = target_new
        self.target_old = target_old

    def to_requests(self, record: Record, where: str) -> list[EditRequest]:
        """Turns one record into its request."""
        return [zsre_from_record(record, where, self.target_new, self.target_old)]
