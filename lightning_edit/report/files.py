# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A report as a folder of files, and back: each file is whole or not there."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from lightning_edit.core.documents import parse_json
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.files import replacing
from lightning_edit.report.card import render_card
from lightning_edit.report.markdown import render_markdown
from lightning_edit.report.page import render_html
from lightning_edit.report.results import RunReport, plain

__all__ = [
    "EDITS",
    "FILES",
    "FORMAT_VERSION",
    "RESULTS",
    "is_foreign_card",
    "read_report",
    "write_results",
]

FORMAT_VERSION = 1
RESULTS = "results.json"
EDITS = "edits.jsonl"

#: Everything that a report consists of.
FILES = (EDITS, RESULTS, "report.md", "report.html", "README.md")

# Those that other programs read come first in the file.
_FIRST = ("metrics", "method", "model", "requests_sha256", "versions", "seconds")


def write_results(report: RunReport, folder: str | Path, files: Collection[str] = FILES) -> Path:
    """Writes ``results.json``, ``edits.jsonl``, ``report.md``, ``report.html`` and ``README.md``.

    Args:
        report: The run.
        folder: Created if need be; files of an earlier report in it are replaced.
        files: Which of them to write.

    Returns:
        The folder.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_results(RunReport(method="ROME"), folder)
        ...     sorted(file.name for file in path.iterdir())
        ['README.md', 'edits.jsonl', 'report.html', 'report.md', 'results.json']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Edits before results: whoever finds new results finds their edits too.
    for name in FILES:
        if name in files:
            _write(folder / name, _RENDER[name](report))
    return folder


def read_report(folder: str | Path) -> RunReport:
    """Reads ``results.json`` and, where it is there, ``edits.jsonl``.

    Args:
        folder: Folder that ``write_results`` wrote.

    Raises:
        ArtifactError: If the results are missing, damaged or of a newer format.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     read_report(write_results(RunReport(method="ROME"), folder)).method
        'ROME'
    """
    folder = Path(folder)
    path = folder / RESULTS
    if not path.is_file():
        raise ArtifactError(
            f"`{folder}` holds no report: the file `{RESULTS}` is missing. Name the folder of a "
            "run, the one that this file was written to."
        )
    record = _parse(path.read_bytes(), str(path))
    if not isinstance(record, dict):
        raise ArtifactError(f"`{path}` is damaged: expected an object, but got {record!r}.")
    version = record.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ArtifactError(
            f"`{path}` was written in format {version!r}, newer than {FORMAT_VERSION}, which this "
            "version of lightning_edit reads. Upgrade with `pip install -U lightning-edit`."
        )
    edits = folder / EDITS
    if edits.is_file():
        lines = edits.read_bytes().split(b"\n")
        record["edits"] = [
            _parse(line, f"{edits}, line {i}") for i, line in enumerate(lines, 1) if line.strip()
        ]
    return RunReport.from_dict(record, where=str(path))


def is_foreign_card(path: Path) -> bool:
    """Whether a file is the README of something else, such as a project that a run lies in.

    Args:
        path: A file of a run's folder; it may be missing.
    """
    if path.name != "README.md" or not path.is_file():
        return False
    return "library_name: lightning_edit" not in path.read_text("utf-8", errors="replace")


def _edits(report: RunReport) -> str:
    return "".join(f"{_json(plain(edit))}\n" for edit in report.edits)


def _results(report: RunReport) -> str:
    record = report.to_dict()
    del record["edits"]
    first = {name: record.pop(name) for name in (*_FIRST, "peak_memory_bytes")}
    return _json({**first, **record, "format_version": FORMAT_VERSION}, indent=2) + "\n"


_RENDER = {
    EDITS: _edits,
    RESULTS: _results,
    "report.md": render_markdown,
    "report.html": render_html,
    "README.md": render_card,
}


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)


def _parse(text: bytes, where: str) -> object:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ArtifactError(
            f"`{where}` is damaged: it is not JSON ({error}). Restore the file from a backup, or "
            "run the evaluation again."
        ) from None


def _write(path: Path, text: str) -> None:
    # Half of a surrogate pair, which a request may hold, has no UTF-8; JSON reads \udxxx back.
    with (
        replacing(path) as part,
        part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        file.write(text)
