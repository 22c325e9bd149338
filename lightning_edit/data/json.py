# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Requests in files: JSON, JSON Lines and YAML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from lightning_edit.core.documents import parse_json, parse_yaml, read_text
from lightning_edit.core.errors import RequestError
from lightning_edit.core.request import EditRequest
from lightning_edit.data.records import Record, without_nones

__all__ = ["read_records", "read_requests", "request_from_record", "write_requests"]

_SUFFIXES = (".json", ".jsonl", ".yaml", ".yml")


def read_records(path: str | Path) -> list[tuple[str, Record]]:
    """Reads the records of a file, each with the words that name it in errors.

    Args:
        path: A ``.json`` or ``.yaml`` file with one list of records, or a ``.jsonl`` file with one
            record a line.

    Returns:
        Pairs of a place, such as ``"zsre.json[17]"`` (counted from zero) or
        ``"edits.jsonl, line 3"``, and a record.

    Raises:
        RequestError: If there is no such file, it is not of these types, it is malformed, or it
            holds something other than records.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise RequestError(
            f"{path}: a file of records is expected to end in {', '.join(_SUFFIXES)}, "
            f"but got {path.suffix or 'no suffix'!r}."
        )
    try:
        content = read_text(path, "utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise RequestError(
                f"{path}: expected UTF-8 text, but {error}. Save it as UTF-8."
            ) from None
        raise RequestError(
            f"{path}: the file cannot be read ({getattr(error, 'strerror', None) or error}). "
            f"`path` counts from {Path.cwd()}; check the spelling."
        ) from None
    if path.suffix.lower() == ".jsonl":
        lines = ((n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip())
        placed = [(f"{path.name}, line {n}", _parse_json(line, path, n)) for n, line in lines]
    else:
        parse = _parse_json if path.suffix.lower() == ".json" else _parse_yaml
        records = parse(content, path)
        if not isinstance(records, list):
            raise RequestError(
                f"{path}: expected one list of records, but got {type(records).__name__}. "
                "Put the records between [ and ], or one a line in a .jsonl file."
            )
        placed = [(f"{path.name}[{i}]", record) for i, record in enumerate(records)]
    checked: list[tuple[str, Record]] = []
    for where, record in placed:
        if not isinstance(record, dict):
            raise RequestError(f"{where}: expected a record of named fields, but got {record!r}.")
        checked.append((where, record))
    return checked


def read_requests(path: str | Path) -> list[EditRequest]:
    """Reads requests written in the fields of [`EditRequest`][lightning_edit.EditRequest].

    Args:
        path: A ``.json``, ``.jsonl``, ``.yaml`` or ``.yml`` file.

    Raises:
        RequestError: If the file or a record in it cannot be read; the message names the record
            and the field.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "edits.yaml"
        >>> _ = path.write_text("- {prompt: 'The capital of {} is', subject: France,"
        ...                     " target_new: Rome}")
        >>> read_requests(path)[0].prompt
        'The capital of France is'
    """
    return [request_from_record(record, where) for where, record in read_records(path)]


def request_from_record(record: Record, where: str) -> EditRequest:
    """Reads one request written in the fields of [`EditRequest`][lightning_edit.EditRequest].

    Args:
        record: Plain JSON types; ``None`` counts as absent.
        where: Names the file and record in errors.

    Raises:
        RequestError: If the record cannot be read, or holds anything but texts: YAML turns ``1998``
            and ``no`` into a number and a truth value, and would edit the model to another answer.
    """
    _check_texts(record, "", where)
    return EditRequest.from_dict(without_nones(record), where)


def write_requests(requests: Iterable[EditRequest], path: str | Path) -> None:
    """Writes requests to a file that ``read_requests`` reads back equal.

    Args:
        requests: The requests.
        path: Its suffix (``.json``, ``.jsonl``, ``.yaml``, ``.yml``) chooses the form.

    Raises:
        RequestError: If the suffix is none of these.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "edits.jsonl"
        >>> request = EditRequest("The capital of France is", "France", "Rome")
        >>> write_requests([request], path)
        >>> read_requests(path) == [request]
        True
    """
    path = Path(path)
    records = [_plain(request.to_dict()) for request in requests]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    match path.suffix.lower():
        case ".jsonl":
            content = "".join(f"{line}\n" for line in lines)
        case ".json":
            content = "[\n" + ",\n".join(lines) + "\n]\n"
        case ".yaml" | ".yml":
            content = yaml.safe_dump(records, allow_unicode=True, sort_keys=False)
        case suffix:
            raise RequestError(
                f"{path}: the name is expected to end in {', '.join(_SUFFIXES)}, "
                f"but got {suffix or 'no suffix'!r}."
            )
    path.write_text(content, encoding="utf-8")


def _parse_json(content: str, path: Path, line: int | None = None) -> object:
    try:
        return parse_json(content)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"{path}, line {line or error.lineno}, column {error.colno}: not JSON: {error.msg}."
        ) from None
    except ValueError as error:
        where = f"{path}, line {line}" if line else f"{path}"
        raise RequestError(f"{where}: cannot be read as JSON: {error}.") from None


def _parse_yaml(content: str, path: Path) -> object:
    try:
        return parse_yaml(content)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RequestError(f"{path}{place}: not YAML: {problem}.") from None
    except ValueError as error:
        raise RequestError(f"{path}: cannot be read as YAML: {error}.") from None


def _check_texts(value: object, name: str, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_texts(item, f"{name}.{key}" if name else str(key), where)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for i, item in enumerate(value):
            _check_texts(item, f"{name}[{i}]", where)
    elif value is not None and not isinstance(value, str):
        raise RequestError(
            f"{where}: `{name}` is expected to be text, but got {value!r}. Put it in quotes."
        )


def _plain(value: object) -> object:
    """Turns tuples into lists, which is how they come back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
