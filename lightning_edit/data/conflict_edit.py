# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""ConflictEdit and RoundEdit: pairs of edits of which the second contradicts the first.

Li et al., ICLR 2024 (arXiv:2310.02129).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from lightning_edit.core.errors import RequestError
from lightning_edit.core.request import EditRequest, Probe
from lightning_edit.data.base import EditDataModule
from lightning_edit.data.records import Record, optional_text, text

__all__ = ["ConflictEdit", "conflict_from_record"]

ConflictName = Literal["coverage", "reverse", "composite", "round"]


def conflict_from_record(record: Record, where: str) -> list[EditRequest]:
    """Reads one pair of edits as the two requests of a case, in the order in which they are made.

    The second has a probe of kind ``conflict``: the fact that follows from it and contradicts the
    first.

    | ``type`` | the second edit | the fact that follows |
    |---|---|---|
    | ``coverage`` | gives the same subject and relation another object | itself |
    | ``reverse`` | changes the inverse of the first | by the inverse relation |
    | ``composite`` | changes what follows from the first and a tied fact | by that fact |

    The tied facts are probes of locality, for both edits leave them true. A record with ``edit``
    and ``true_objects`` is one of RoundEdit: the second edit takes the first back, and the other
    true objects are ``neighborhood`` probes of the same prompt.

    Args:
        record: The record.
        where: Names the file and record in errors.

    Raises:
        RequestError: If a field is missing or no text, or the type is unknown.

    Examples:
        >>> def fact(subject, old, new, prompt):
        ...     return {"relation": {"prompt": prompt}, "subject": {"label": subject},
        ...             "object": {"label": old}, "new_object": {"label": new}}
        >>> first, second = conflict_from_record({"type": "reverse", "edits": [
        ...     fact("Ada", "Tom", "Jim", "The father of {} is"),
        ...     fact("Jim", "Ada", "Eve", "The child of {} is")]}, "reverse.json[0]")
        >>> second.portability[0].prompt, second.portability[0].answer
        ('The father of Eve is', 'Jim')
    """
    if "edit" in record:
        return _round(record, where)
    edits = record.get("edits")
    if not isinstance(edits, list) or len(edits) != 2:
        raise RequestError(
            f"{where}: `edits` is expected to be a list of two, but got {edits!r:.80}."
        )
    first, second = (_request(edit, f"{where}, edits[{i}]") for i, edit in enumerate(edits))
    kind = text(record, "type", where)
    relation = text(edits[0], "relation.prompt", f"{where}, edits[0]")
    if kind == "coverage":
        follows = Probe(second.prompt, second.target_new, "conflict")
    elif kind == "reverse":
        prompt = relation.replace("{}", second.target_new, 1)
        follows = Probe(prompt, first.target_new, "conflict")
    elif kind == "composite":
        follows = Probe(first.prompt, second.target_new, "conflict")
    else:
        raise RequestError(
            f"{where}: `type` is expected to be coverage, reverse or composite, but got {kind!r}."
        )
    second = replace(second, portability=(follows,), locality=_tied(record, where))
    return _paired(kind, first, second)


def _request(edit: Record, where: str) -> EditRequest:
    subject = text(edit, "subject.label", where)
    query = optional_text(_part(edit, "relation", where), "query", where)
    fields = {
        "prompt": text(edit, "relation.prompt", where),
        "subject": subject,
        "target_new": text(edit, "new_object.label", where),
        "target_old": text(edit, "object.label", where),
        "rephrases": [query.replace("{}", subject, 1)] if query else [],
    }
    return EditRequest.from_dict(fields, where)


def _tied(record: Record, where: str) -> tuple[Probe, ...]:
    """Facts that the contradiction rests on, where it rests on any."""
    probes = []
    triples, named = record.get("triples") or [], record.get("prerequisites") or []
    if not isinstance(triples, list) or not isinstance(named, list):
        raise RequestError(f"{where}: `triples` and `prerequisites` are expected to be lists.")
    for i in named:
        place = f"{where}, triples[{i}]"
        if not (isinstance(i, int) and 0 <= i < len(triples)):
            raise RequestError(f"{where}: `prerequisites` names {i!r}, which is none of `triples`.")
        prompt = text(triples[i], "relation.prompt", place)
        prompt = prompt.replace("{}", text(triples[i], "subject.label", place), 1)
        probes.append(Probe(prompt, text(triples[i], "object.label", place), "unrelated"))
    return tuple(probes)


def _round(record: Record, where: str) -> list[EditRequest]:
    first = _request(_part(record, "edit", where), f"{where}, edit")
    objects = record.get("true_objects")
    if not isinstance(objects, list):
        raise RequestError(
            f"{where}: `true_objects` is expected to be a list of objects, but got {objects!r:.80}."
        )
    named = [text(one, "label", f"{where}, true_objects[{i}]") for i, one in enumerate(objects)]
    others = [name for name in dict.fromkeys(named) if name != first.target_old]
    probes = tuple(Probe(first.prompt, name, "neighborhood") for name in others)
    return _paired("round", first, replace(first.reversed(), locality=probes))


def _part(record: Record, name: str, where: str) -> Record:
    found = record.get(name)
    if not isinstance(found, Mapping):
        raise RequestError(f"{where}: `{name}` is expected to be a record, but got {found!r:.80}.")
    return found


def _paired(kind: str, first: EditRequest, second: EditRequest) -> list[EditRequest]:
    case = f"{kind}-{first.id}-{second.id}"
    return [replace(first, case=case), replace(second, case=case)]


class ConflictEdit(EditDataModule):
    """Pairs of edits of which the second contradicts the first (ConflictEdit, RoundEdit).

    The edits of a pair are a case: under ``test_protocol="independent"`` they are made one after
    another, and measured after each.

    Args:
        kind: Keep the pairs of this kind; all of them when null.
        kwargs: Arguments of [`EditDataModule`][lightning_edit.EditDataModule].
    """

    def __init__(self, kind: ConflictName | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = kind

    def to_requests(self, record: Record, where: str) -> list[EditRequest]:
        """Turns one pair into its requests, or into none if it is of another kind."""
        kind = "round" if "edit" in record else record.get("type")
        return conflict_from_record(record, where) if self.kind in (None, kind) else []
