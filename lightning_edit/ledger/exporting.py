# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The rows of a ledger as files that other programs read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from lightning_edit.core.errors import LedgerError
from lightning_edit.core.files import replacing
from lightning_edit.ledger.entries import COLUMNS, Entry

__all__ = ["export"]

_JSON = ("requests", "settings", "base", "undoes", "scores", "versions")
# By these, programs for tables know a formula, which they would compute.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def export(entries: Sequence[Entry], path: Path, *, force: bool) -> int:
    """Writes rows as JSON lines or CSV, whole or not at all.

    Args:
        entries: The rows.
        path: A file that ends with ``.jsonl`` or ``.csv``.
        force: Replace a file that is there.

    Returns:
        The number of rows.

    Raises:
        LedgerError: If the file is there, its name ends otherwise, or it cannot be written.
    """
    writers = {".jsonl": _json_lines, ".csv": _table}
    if path.suffix not in writers:
        raise LedgerError(f"`{path}` is expected to end with {' or '.join(writers)}.")
    if path.is_dir() or (path.exists() and not force):
        raise LedgerError(
            f"`{path}` is there already. Give another file, or `force` to replace it."
        )
    text = writers[path.suffix](entries)
    try:
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise LedgerError(str(error)) from None
    return len(entries)


def _json_lines(entries: Sequence[Entry]) -> str:
    lines = []
    for entry in entries:
        row = entry.row()
        full = {n: json.loads(str(v)) if n in _JSON else v for n, v in row.items()}
        lines.append(json.dumps(full) + "\n")
    return "".join(lines)


def _table(entries: Sequence[Entry]) -> str:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for entry in entries:
        cells = map(str, entry.row().values())
        writer.writerow(f"'{cell}" if cell.startswith(_FORMULA) else cell for cell in cells)
    return file.getvalue()
