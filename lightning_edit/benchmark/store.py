# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The folder of results: what is in it is whole, whenever the program that wrote it was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from lightning_edit.benchmark.rows import CellRow
from lightning_edit.core.errors import ArtifactError, MissingDependencyError
from lightning_edit.core.files import BINARY, replacing
from lightning_edit.report.files import write_file

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

__all__ = ["CellPart", "CellRecord", "ResultsFolder", "need_pandas"]


class CellRecord(TypedDict, total=False):
    """What a cell came to: a line of ``cells.jsonl``.

    The last line of a key is the one that counts.
    """

    key: str
    #: ``done`` or ``failed``, and why.
    status: str
    error: str
    #: Labels at the time, and what made the cell: all that is in its key.
    method: str
    data: str
    protocol: str
    seed: int
    made_of: Mapping[str, object]
    #: Requests that were edited, and those that the method failed on.
    requests: int
    failed: int
    #: Seconds of the whole cell, and of its edits.
    seconds: float
    edit_seconds: float
    #: Most memory that was held at a time while the cell ran.
    peak_memory_bytes: int | None
    #: Perplexity on prose after all edits over that before; where they stand in the model together.
    perplexity_ratio: float | None
    device: str
    created: str


class CellPart(TypedDict):
    """What some requests of a cell came to, kept until the cell is done."""

    rows: list[CellRow]
    failed: int
    edit_seconds: float
    peak_memory_bytes: int | None
    perplexity_ratio: float | None
    seconds: float


class ResultsFolder:
    """Cells and their rows on disk.

    ``cells.jsonl`` gets a line a cell when its rows are on disk, so that a cell that has one is
    whole. A line that a power cut left half written is passed over.

    Args:
        path: The folder; made when something is written.

    Examples:
        >>> folder = ResultsFolder(getfixture("tmp_path") / "results")
        >>> folder.records()
        {}
        >>> folder.add({"key": "ab", "status": "failed", "error": "out of memory"}, [])
        >>> folder.records()["ab"]["error"]
        'out of memory'
    """

    CELLS = "cells.jsonl"
    EDITS = "edits.parquet"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def records(self) -> dict[str, CellRecord]:
        """The last record of each cell by key; a done one only while its rows are there."""
        file = self.path / self.CELLS
        found: dict[str, CellRecord] = {}
        for line in file.read_bytes().split(b"\n") if file.is_file() else ():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("key"), str):
                found[record["key"]] = cast(CellRecord, record)
        return {
            key: record
            for key, record in found.items()
            if record.get("status") != "done" or self._rows_of(key).is_file()
        }

    def add(self, record: CellRecord, rows: Sequence[CellRow]) -> None:
        """Writes what a cell came to: first its rows, then its line.

        Args:
            record: Of the cell.
            rows: Its probes; none of a cell that failed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if record["status"] == "done":
            self._write_rows(self._rows_of(record["key"]), rows)
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        file = os.open(self.path / self.CELLS, os.O_RDWR | os.O_APPEND | os.O_CREAT | BINARY, 0o644)
        try:
            size = os.fstat(file).st_size
            # What a power cut left of a line is ended, and passed over by whoever reads.
            os.lseek(file, max(size - 1, 0), os.SEEK_SET)
            is_cut = size > 0 and os.read(file, 1) != b"\n"
            os.write(file, b"\n" + line if is_cut else line)  # at once: none comes between
            os.fsync(file)
        finally:
            os.close(file)
        if record["status"] == "done":
            for part in self.path.glob(f"cells/{record['key']}.*.json"):
                part.unlink()

    def frame(self, keys: Iterable[str]) -> pd.DataFrame:
        """The rows of some cells that are done.

        Args:
            keys: Their keys.
        """
        need_pandas()
        import pandas as pd
        import pyarrow.parquet as pq

        tables = [pq.read_table(self._rows_of(key)) for key in keys]
        if not tables:
            return pd.DataFrame(columns=list(CellRow.__annotations__))
        import pyarrow as pa

        return pa.concat_tables(tables).to_pandas()

    def combine(self, keys: Iterable[str]) -> Path | None:
        """Writes ``edits.parquet``: the rows of all these cells.

        Args:
            keys: Keys of cells that are done.

        Returns:
            The file; None where there is no cell.
        """
        import pyarrow.parquet as pq

        files = [self._rows_of(key) for key in keys]
        if not files:
            return None
        target = self.path / self.EDITS
        with replacing(target) as part, pq.ParquetWriter(part, _schema()) as writer:
            for file in files:  # one at a time: together they may be larger than the memory
                writer.write_table(pq.read_table(file))
        return target

    def read_json(self, name: str) -> Mapping[str, object] | None:
        """What ``write_json`` wrote, or None where there is nothing.

        Raises:
            ArtifactError: If the file is damaged.
        """
        file = self.path / name
        if not file.is_file():
            return None
        try:
            found: Mapping[str, object] = json.loads(file.read_bytes())
        except ValueError as error:
            raise ArtifactError(
                f"`{file}` is damaged ({error}). Take it away: it is measured again then."
            ) from None
        return found

    def read_part(self, name: str) -> CellPart | None:
        """A part of a cell, or None where it has not been measured."""
        found = self.read_json(name)
        return None if found is None else cast(CellPart, found)

    def write_json(self, name: str, value: Mapping[str, object]) -> None:
        """Writes a file, whole or not at all."""
        write_file(self.path / name, json.dumps(value))  # with nan, which a ruined model scores

    def _rows_of(self, key: str) -> Path:
        return self.path / "cells" / f"{key}.parquet"

    def _write_rows(self, path: Path, rows: Sequence[CellRow]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with replacing(path) as part:
            pq.write_table(pa.Table.from_pylist(list(rows), schema=_schema()), part)


def need_pandas() -> None:
    """Checks that the packages are there that tables of many rows take.

    Raises:
        MissingDependencyError: If one is not.
    """
    for package in ("pandas", "pyarrow"):
        try:
            __import__(package)
        except ImportError:
            raise MissingDependencyError(package, "compare", "A comparison") from None


def _schema() -> pa.Schema:
    """The columns of a row, so that one without values has the type of all others."""
    import pyarrow as pa

    kinds = {
        "str": pa.string(),
        "int": pa.int64(),
        "bool": pa.bool_(),
        "list[str]": pa.list_(pa.string()),
        "float | None": pa.float64(),
        "bool | None": pa.bool_(),
    }
    # Annotations are texts here, which typing keeps as forward references.
    named = {k: getattr(v, "__forward_arg__", v) for k, v in CellRow.__annotations__.items()}
    return pa.schema([(name, kinds[str(kind)]) for name, kind in named.items()])
