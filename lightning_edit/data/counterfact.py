# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""CounterFact: false statements about subjects, with prompts about the subject's neighbors.

Meng et al., NeurIPS 2022 (arXiv:2202.05262); distracting neighborhood prompts Hoelscher-Obermaier
et al., 2023 (arXiv:2305.17553); portability Yao et al., EMNLP 2023 (arXiv:2305.13172).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from lightning_edit.core.errors import RequestError
from lightning_edit.core.request import EditRequest, Probe
from lightning_edit.data.base import EditDataModule
from lightning_edit.data.json import read_records
from lightning_edit.data.records import Record, optional_text, probe_if, text, texts

__all__ = ["CounterFact", "counterfact_from_record"]


class _Fields(TypedDict):
    """Fields of a request that both schemas have."""

    prompt: str
    subject: str
    target_new: str
    target_old: str | None
    rephrases: list[str]
    locality: Sequence[Probe]


def counterfact_from_record(record: Record, where: str) -> EditRequest:
    """Reads one record, in the original schema or the flat one of later toolkits.

    The schema is told by its fields. Original: ``requested_rewrite``, ``paraphrase_prompts``,
    ``neighborhood_prompts``; the neighbors share the old answer. Flat: ``prompt``, ``subject``,
    ``target_new``, ``ground_truth``, ``rephrase_prompt``, ``locality_prompt``,
    ``locality_ground_truth``. Both may carry the fields of the portability file: ``portability``
    (one hop), ``alternative_subject`` (the prompt with the other name), ``unrelated_relation``
    (another relation of the subject) and ``distracting_neighborhood_prompts`` (the new fact before
    the neighbor's).

    Args:
        record: The record.
        where: Names the file and record in errors.

    Raises:
        RequestError: If a field is missing or no text, or the subject is not in the prompt.

    Examples:
        >>> request = counterfact_from_record({"case_id": 7, "requested_rewrite": {
        ...     "prompt": "{} was born in", "subject": "Ada", "target_new": {"str": "Rome"},
        ...     "target_true": {"str": "London"}}, "paraphrase_prompts": [],
        ...     "neighborhood_prompts": ["Tom was born in"]}, "cf.json[0]")
        >>> request.id, request.prompt, request.locality[0].answer
        ('counterfact-7', 'Ada was born in', 'London')
    """
    if "requested_rewrite" in record:
        fields = _original(record, where)
    elif "prompt" in record:
        fields = _flat(record, where)
    else:
        raise RequestError(
            f"{where}: expected `requested_rewrite` (the original schema of CounterFact) or "
            f"`prompt` (the flat one), but got the fields {', '.join(record)}."
        )
    old = fields["target_old"] or ""
    locality = list(fields["locality"])
    locality += [
        Probe(prompt, old, "distracting")
        for prompt in texts(record, "distracting_neighborhood_prompts", where)
    ]
    if record.get("unrelated_relation"):
        question = text(record, "unrelated_relation.question", where)
        answer = text(record, "unrelated_relation.object", where)
        locality.append(Probe(question, answer, "unrelated"))
    portability = []
    if record.get("portability"):
        question = text(record, "portability.New Question", where)
        answer = text(record, "portability.New Answer", where)
        portability.append(Probe(question, answer, "one_hop"))
    if alias := optional_text(record, "alternative_subject", where):
        place = "{}" if "{}" in fields["prompt"] else fields["subject"]
        prompt = fields["prompt"].replace(place, alias, 1)
        portability.append(Probe(prompt, fields["target_new"], "subject_alias"))
    case = record.get("case_id")
    identity = "" if case is None else f"counterfact-{case}"
    probes = {"locality": locality, "portability": portability}
    return EditRequest.from_dict({**fields, **probes, "id": identity}, where)


def _original(record: Record, where: str) -> _Fields:
    old = text(record, "requested_rewrite.target_true.str", where)
    return {
        "prompt": text(record, "requested_rewrite.prompt", where),
        "subject": text(record, "requested_rewrite.subject", where),
        "target_new": text(record, "requested_rewrite.target_new.str", where),
        "target_old": old,
        "rephrases": texts(record, "paraphrase_prompts", where),
        "locality": [
            Probe(prompt, old, "neighborhood")
            for prompt in texts(record, "neighborhood_prompts", where)
        ],
    }


def _flat(record: Record, where: str) -> _Fields:
    neighbor = optional_text(record, "locality_prompt", where)
    answer = optional_text(record, "locality_ground_truth", where)
    return {
        "prompt": text(record, "prompt", where),
        "subject": text(record, "subject", where),
        "target_new": text(record, "target_new", where),
        "target_old": optional_text(record, "ground_truth", where),
        "rephrases": texts(record, "rephrase_prompt", where),
        "locality": probe_if(neighbor, answer, "neighborhood"),
    }


class CounterFact(EditDataModule):
    """False statements, with paraphrases and neighbors (CounterFact, original or flat).

    Args:
        portability_path: File with further probes, joined on ``case_id``.
        kwargs: Arguments of [`EditDataModule`][lightning_edit.EditDataModule].

    Raises:
        RequestError: From ``setup``, if no record of the portability file belongs to the data set.
    """

    def __init__(self, portability_path: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.portability_path = portability_path

    def read_records(self) -> list[tuple[str, Record]]:
        """Reads the records, with the fields of the portability file added to theirs."""
        records = super().read_records()
        if self.portability_path is None:
            return records
        further: dict[str, Record] = {}
        for where, record in read_records(self.portability_path):
            if "case_id" not in record:
                raise RequestError(f"{where}: the field `case_id` is missing.")
            further[str(record["case_id"])] = record
        joined: list[tuple[str, Record]] = []
        matches = 0
        for where, record in records:
            extra = further.get(str(record.get("case_id")), {})
            matches += bool(extra)
            joined.append((where, {**record, **extra}))
        if not matches:
            raise RequestError(
                f"{self.portability_path}: no `case_id` in it belongs to a record of "
                f"{self.source}. Give the portability file of the same data set."
            )
        return joined

    def to_requests(self, record: Record, where: str) -> list[EditRequest]:
        """Turns one record into its request."""
        return [counterfact_from_record(record, where)]
