# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What in a ledger is not as it was written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning_edit.core.errors import LedgerError
from lightning_edit.ledger.database import Database
from lightning_edit.ledger.deltas import DeltaFolder
from lightning_edit.ledger.entries import GENESIS, Columns, entry_of, row_hash
from lightning_edit.ledger.outcomes import Problem
from lightning_edit.ledger.signing import is_signed

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["problems"]


def problems(
    database: Database, connection: Connection, deltas: DeltaFolder, key: str | None, head: str
) -> Iterator[Problem]:
    """What is not as it was written.

    Args:
        database: The rows.
        connection: Of its ``reading``.
        deltas: The saved edits.
        key: The public key by which every row must be signed, in hexadecimal; that of the row when
            None.
        head: Hash of a row that must be there; any when empty.
    """
    expected, previous, is_found = 1, GENESIS, head in ("", GENESIS)
    for row in database.rows(connection):
        number = int(row["id"])
        for missing in range(expected, number):
            yield Problem(missing, "it is missing")
        if row["previous"] != previous and number == expected:
            yield Problem(number, "it does not follow on the row before it, which was changed")
        for what in _wrong(row, deltas, key):
            yield Problem(number, what)
        is_found = is_found or row["hash"] == head
        expected, previous = number + 1, str(row["hash"])
    for missing in range(expected, database.ever(connection) + 1):
        yield Problem(missing, "it is missing, at the end of the ledger")
    if database.ever(connection) < expected - 1:
        yield Problem(0, "the number of rows that were ever written was changed")
    if not is_found:
        yield Problem(0, f"no row has the hash {head[:12]}…, which was that of the last one")
    for name in database.missing_triggers(connection):
        yield Problem(0, f"the database no longer keeps rows from being changed (`{name}` is gone)")


def _wrong(row: Columns, deltas: DeltaFolder, key: str | None) -> Iterator[str]:
    if row_hash(row) != row["hash"]:
        yield "it was changed: its hash is not that of its content"
    try:
        entry_of(row)
    except LedgerError as error:
        yield str(error)
    if row["delta"] and (problem := deltas.problem(str(row["delta"]))):
        yield problem
    signer = str(row["public_key"])
    if key is not None and signer != key:
        yield f"it is signed by another key ({signer[:12]}…)" if signer else "it is not signed"
    elif bool(signer) != bool(row["signature"]):
        yield "its signature is missing" if signer else "it has a signature, but of nobody"
    elif signer and not is_signed(str(row["hash"]), str(row["signature"]), signer):
        yield "its signature is wrong"
