# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""KnowEdit: changed and recent facts of Wikidata, zsRE, and sentences of biographies.

Zhang et al., 2024 (arXiv:2401.01286); ``wiki_counterfact`` and ``wiki_recent`` come from
RippleEdits (Cohen et al., TACL 2024, arXiv:2307.12976), ``WikiBio`` from Hartvigsen et al., NeurIPS
2023 (arXiv:2211.11031).
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_edit.core.errors import RequestError
from lightning_edit.core.request import EditRequest, Probe
from lightning_edit.data.base import EditDataModule
from lightning_edit.data.records import Record, aliased_probe, text, texts

__all__ = ["KnowEdit", "knowedit_from_record"]

# Kinds of locality follow the relation: the same one is the neighborhood, another one is unrelated.
_KINDS = {
    "portability": {
        "Reasoning": "one_hop",
        "Subject_Aliasing": "subject_alias",
        "Logical_Generalization": "inverse",
    },
    "locality": {
        "Relation_Specificity": "unrelated",
        "Forgetfulness": "neighborhood",
    },
}


def knowedit_from_record(record: Record, where: str) -> EditRequest:
    """Reads one record of ``wiki_counterfact``, ``wiki_recent``, ``ZsRE`` or ``WikiBio``.

    WikiBio is known by ``text, concept, labels`` (the edit teaches the right next sentence), the
    others share ``prompt, subject, target_new`` and, where known, ``ground_truth`` and a rephrase.
    The kinds of probe: Reasoning is ``one_hop``; Subject_Aliasing ``subject_alias``;
    Logical_Generalization ``inverse``, for most of it is the inverse relation, the rest other
    consequences of the fact; Relation_Specificity (other relations of the subject) ``unrelated``;
    Forgetfulness (further answers to the same relation) ``neighborhood``. Of several right answers
    the first is the answer, the rest are its aliases.

    Args:
        record: The record.
        where: Names the file and record in errors.

    Raises:
        RequestError: If a field is missing or no text, or the subject is not in the prompt.

    Examples:
        >>> request = knowedit_from_record({
        ...     "subject": "Ada", "prompt": "The native country of Ada is", "target_new": "Italy",
        ...     "ground_truth": "England", "portability": {"Reasoning": [
        ...         {"prompt": "The capital of Ada's country is", "ground_truth": [["Rome"]]}]}},
        ...     "wiki.json[0]")
        >>> request.target_old, request.portability[0].kind
        ('England', 'one_hop')
    """
    probes = {
        "locality": _probes(record, "locality", where),
        "portability": _probes(record, "portability", where),
    }
    if "concept" in record:
        edit = {
            "prompt": text(record, "text", where),
            "subject": text(record, "concept", where),
            "target_new": text(record, "labels", where),
        }
        return EditRequest.from_dict({**edit, **probes}, where)
    edit = {name: text(record, name, where) for name in ("prompt", "subject", "target_new")}
    old = texts(record, "ground_truth", where)
    rephrases = texts(record, "rephrase", where) + texts(record, "rephrase_prompt", where)
    return EditRequest.from_dict(
        {**edit, **probes, "target_old": old[0] if old else None, "rephrases": rephrases}, where
    )


def _probes(record: Record, name: str, where: str) -> list[Probe]:
    groups = record.get(name) or {}
    if not isinstance(groups, Mapping):
        raise RequestError(f"{where}: `{name}` is expected to be a record of lists of probes.")
    probes = []
    for group, items in groups.items():
        if group not in _KINDS[name]:
            raise RequestError(
                f"{where}: `{name}` holds the unknown group `{group}`. "
                f"Known groups: {', '.join(_KINDS[name])}."
            )
        for i, item in enumerate(items or []):
            probes.append(aliased_probe(item, f"{where}, {name}.{group}[{i}]", _KINDS[name][group]))
    return probes


class KnowEdit(EditDataModule):
    """Changed and recent facts, zsRE and biographies (KnowEdit).

    The form of a record is told by its fields.

    Takes the arguments of [`EditDataModule`][lightning_edit.EditDataModule].
    """

    def to_requests(self, record: Record, where: str) -> list[EditRequest]:
        """Turns one record into its request."""
        return [knowedit_from_record(record, where)]
