# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The database of a ledger: one table in SQLite, to which rows are added and nothing else."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_edit.core.errors import LedgerError, MissingDependencyError
from lightning_edit.ledger.entries import COLUMNS, Columns

if TYPE_CHECKING:
    import sqlite3

    from sqlalchemy import Connection, Engine, Row, Table

__all__ = ["Database"]

#: What the database says of its own layout.
LAYOUT = 1
#: Seconds for which a process waits until another has written its row.
PATIENCE = 60.0
_TABLE = "edits"

_REFUSALS = (
    "CREATE TRIGGER edits_keep_update BEFORE UPDATE ON edits BEGIN "
    "SELECT RAISE(ABORT, 'rows of a ledger are never changed'); END",
    "CREATE TRIGGER edits_keep_delete BEFORE DELETE ON edits BEGIN "
    "SELECT RAISE(ABORT, 'rows of a ledger are never deleted'); END",
    "CREATE TRIGGER edits_keep_order BEFORE INSERT ON edits "
    "WHEN NEW.id <= (SELECT COALESCE(MAX(id), 0) FROM edits) BEGIN "
    "SELECT RAISE(ABORT, 'rows of a ledger are only added at its end'); END",
)


class Database:
    """Rows in a file, each written in a transaction of its own.

    The file is in WAL mode with ``synchronous=FULL``: a row that was written is there after a loss
    of power. Several processes may write; each waits for its turn.

    Args:
        path: The file; made if it is missing.

    Raises:
        LedgerError: If it is no ledger, or cannot be opened.
        MissingDependencyError: If SQLAlchemy is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(f"The ledger `{path}` cannot be made: {error}.") from error
        self._engine = _engine(path)
        with self.reading() as connection:
            is_made = self._is_made(connection)
        if not is_made:
            with self.writing() as connection:  # another process may have been faster
                if not self._is_made(connection):
                    _table().create(connection)
                    for statement in _REFUSALS:
                        connection.exec_driver_sql(statement)
                    connection.exec_driver_sql(f"PRAGMA user_version = {LAYOUT}")

    def reading(self) -> AbstractContextManager[Connection]:
        """Context manager: a connection that sees the rows of one moment."""
        return self._transaction(is_writing=False)

    def writing(self) -> AbstractContextManager[Connection]:
        """Context manager: a connection that has the ledger for itself, until all is written."""
        return self._transaction(is_writing=True)

    @contextmanager
    def _transaction(self, *, is_writing: bool) -> Iterator[Connection]:
        from sqlalchemy.exc import SQLAlchemyError

        engine = self._engine.execution_options(is_writing=is_writing)
        try:
            with engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error)
            raise LedgerError(
                f"The ledger `{self.path}` cannot be {'written' if is_writing else 'read'}: "
                f"{reason}. {_remedy(reason)} Nothing was added to it."
            ) from error

    def _is_made(self, connection: Connection) -> bool:
        from sqlalchemy import inspect

        tables = set(inspect(connection).get_table_names())
        layout = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
        if tables and (layout == 0 or _TABLE not in tables):
            raise LedgerError(f"`{self.path}` is a database, but no ledger. Give another path.")
        if layout > LAYOUT:
            raise LedgerError(
                f"`{self.path}` was written in layout {layout}, newer than {LAYOUT}, which this "
                "version of lightning_edit reads. Upgrade with `pip install -U lightning-edit`."
            )
        return bool(tables)

    def add(self, connection: Connection, columns: Columns) -> None:
        """Adds a row."""
        connection.execute(_table().insert(), columns)

    def rows(self, connection: Connection, number: int | None = None) -> Iterator[Columns]:
        """The rows in order, or the one of a number.

        Args:
            connection: Of ``reading`` or ``writing``.
            number: That of the row.
        """
        from sqlalchemy import select

        table = _table()
        query = select(table).order_by(table.c.id)
        if number is not None:
            query = query.where(table.c.id == number)
        yield from map(_columns, connection.execute(query))

    def last(self, connection: Connection) -> Columns | None:
        """The row that was added last."""
        from sqlalchemy import select

        table = _table()
        found = connection.execute(select(table).order_by(table.c.id.desc()).limit(1)).first()
        return None if found is None else _columns(found)

    def alike(self, connection: Connection, known: Columns) -> Iterator[Columns]:
        """The rows with these values in these columns, the newest first.

        Args:
            connection: Of ``reading`` or ``writing``.
            known: Value of each column that is to be compared.
        """
        from sqlalchemy import select

        table = _table()
        query = select(table).order_by(table.c.id.desc())
        for name, value in known.items():
            query = query.where(table.c[name] == value)
        yield from map(_columns, connection.execute(query))

    def ever(self, connection: Connection) -> int:
        """The highest number that a row ever had, which SQLite keeps apart from the rows."""
        from sqlalchemy import column, select, table

        kept = table("sqlite_sequence", column("name"), column("seq"))
        query = select(kept.c.seq).where(kept.c.name == _TABLE)
        return int(connection.execute(query).scalar() or 0)

    def undone(self, connection: Connection, after: int) -> set[int]:
        """Numbers of the rows that were taken back by rows after one of a number."""
        from sqlalchemy import select

        table = _table()
        query = select(table.c.undoes).where(table.c.id > after, table.c.undoes != "[]")
        return {
            int(number) for undoes in connection.scalars(query) for number in json.loads(undoes)
        }

    def missing_triggers(self, connection: Connection) -> list[str]:
        """Names of what keeps rows from being changed, where it was taken off."""
        from sqlalchemy import column, select, table

        schema = table("sqlite_master", column("type"), column("sql"))
        query = select(schema.c.sql).where(schema.c.type == "trigger")
        there = set(connection.scalars(query))
        return [statement.split()[2] for statement in _REFUSALS if statement not in there]


def _columns(row: Row[tuple[str | int, ...]]) -> Columns:
    # Who writes past the ledger may leave bytes or nothing where a text belongs.
    found = row._mapping
    return {n: v if isinstance(v := found[n], (str, int)) else repr(v) for n in COLUMNS}


@functools.cache
def _table() -> Table:
    from sqlalchemy import Column, Integer, MetaData, Table, Text

    columns = [Column("id", Integer, primary_key=True)]
    texts = [Column(name, Text, nullable=False) for name in COLUMNS[1:]]
    return Table(_TABLE, MetaData(), *columns, *texts, sqlite_autoincrement=True)


def _engine(path: Path) -> Engine:
    try:
        from sqlalchemy import URL, create_engine, event
        from sqlalchemy.pool import NullPool
    except ImportError:
        raise MissingDependencyError("sqlalchemy", "ledger", "A ledger") from None

    # A connection for each transaction: it is safe in forked processes, and once the last is
    # closed, the file holds everything.
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=NullPool,
        connect_args={"timeout": PATIENCE},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        is_writing = connection.get_execution_options().get("is_writing")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")

    return engine


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Puts a database into WAL mode, for which SQLite does not wait by itself."""
    import sqlite3

    patience = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > patience:
                raise
            time.sleep(0.01)


def _remedy(reason: str) -> str:
    """What to do about an error of SQLite."""
    for words, remedy in (
        ("full", "Make room on the disk, and go on."),
        ("readonly", "Make the file and its folder writable."),
        ("unable to open", "Check that its folder can be written to."),
        ("locked", "Another process has been writing to it for long; try again once it is done."),
        ("not a database", "Restore it from a backup, or give another path."),
        ("malformed", "Restore it from a backup."),
        ("never", "Add a row instead, such as an undo."),
    ):
        if words in reason:
            return remedy
    return "Restore it from a backup, or give another path."
