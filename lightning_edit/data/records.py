# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Fields of data-set records, read with errors that name file, record and field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias, overload

from lightning_edit.core.errors import RequestError
from lightning_edit.core.request import Probe

__all__ = [
    "Record",
    "aliased_probe",
    "optional_text",
    "probe_if",
    "question_of",
    "text",
    "texts",
    "without_nones",
]

Record: TypeAlias = Mapping[str, object]
"""One entry of a data set as plain JSON types."""

_NQ_PREFIX = "nq question: "


def text(record: Record, name: str, where: str) -> str:
    """Reads a field that must hold text; dots reach into nested records.

    White space around it goes, here and below: it got there by accident, and tokenizers mind it.

    Args:
        record: The record.
        name: Name of the field, such as ``"subject"`` or ``"target_new.str"``.
        where: Names the file and record in errors.

    Raises:
        RequestError: If the field is missing, empty or no text.

    Examples:
        >>> text({"target_new": {"str": "Rome"}}, "target_new.str", "edits.json[0]")
        'Rome'
    """
    value: object = record
    for part in name.split("."):
        fields = _fields(value, part, where)
        value = fields.get(part)
        if value is None:
            raise RequestError(
                f"{where}: the field `{name}` is missing. Fields here: {', '.join(fields)}."
            )
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{where}: `{name}` is expected to be text, but got {value!r}.")
    return value.strip()


def optional_text(record: Record, name: str, where: str) -> str | None:
    """Reads a field that holds text where it is there at all; blank counts as absent.

    Raises:
        RequestError: If the field holds something other than text.
    """
    value = _fields(record, name, where).get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return text(record, name, where)


def texts(record: Record, name: str, where: str) -> list[str]:
    """Reads a field that holds one text, a list of texts or lists of texts: flat, without blanks.

    Args:
        record: The record.
        name: Name of the field; a missing one gives an empty list.
        where: Names the file and record in errors.

    Raises:
        RequestError: If something in the field is no text.

    Examples:
        >>> texts({"ground_truth": [["Syria", "SY"], ["Asia"]]}, "ground_truth", "edits.json[0]")
        ['Syria', 'SY', 'Asia']
    """
    found: list[str] = []

    def collect(value: object) -> None:
        if isinstance(value, str):
            if value.strip():
                found.append(value.strip())
        elif isinstance(value, Iterable) and not isinstance(value, Mapping):
            for item in value:
                collect(item)
        else:
            raise RequestError(f"{where}: `{name}` is expected to hold text, but got {value!r}.")

    collect(_fields(record, name, where).get(name) or [])
    return found


def probe_if(prompt: str | None, answer: str | None, kind: str) -> tuple[Probe, ...]:
    """A probe, where the record has a prompt for one."""
    return () if prompt is None else (Probe(prompt, answer or "", kind),)


def aliased_probe(record: Record, where: str, kind: str) -> Probe:
    """Reads ``{"prompt": ..., "ground_truth": ...}``; all answers after the first are aliases."""
    answers = texts(record, "ground_truth", where) or [""]
    return Probe(text(record, "prompt", where), answers[0], kind, tuple(answers[1:]))


def question_of(prompt: str | None) -> str | None:
    """Strips the prefix by which zsRE's sequence-to-sequence models knew a Natural Question.

    Locality compares a model with itself, so the prefix has no work to do; a causal model has never
    seen it, and reads it as an odd beginning.

    Examples:
        >>> question_of("nq question: who sang the theme of skyfall")
        'who sang the theme of skyfall'
    """
    return None if prompt is None else prompt.removeprefix(_NQ_PREFIX)


def _fields(record: object, name: str, where: str) -> Record:
    """A record's fields, of which one is wanted."""
    if not isinstance(record, Mapping):
        raise RequestError(f"{where}: expected a record with `{name}`, but got {record!r}.")
    return record


@overload
def without_nones(value: Record) -> Record: ...


@overload
def without_nones(value: object) -> object: ...


def without_nones(value: object) -> object:
    """Drops the fields that hold ``None``, at any depth: tables write absent fields so.

    Examples:
        >>> without_nones({"prompt": "a", "locality": {"Forgetfulness": None}})
        {'prompt': 'a', 'locality': {}}
    """
    if isinstance(value, Mapping):
        return {key: without_nones(item) for key, item in value.items() if item is not None}
    return [without_nones(item) for item in value] if isinstance(value, list) else value
