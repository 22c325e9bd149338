# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a ledger keeps of an edit: its rows, as data and as what is hashed."""

# Imports nothing that a table on the command line would have to wait for.

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, cast, get_args

from lightning_edit.core.errors import LedgerError
from lightning_edit.core.provenance import BaseModelInfo
from lightning_edit.core.request import EditRequest

__all__ = ["COLUMNS", "GENESIS", "Columns", "Draft", "Entry", "EntryKind", "entry_of", "row_hash"]

#: What happened: an edit was kept, taken out, or made and taken back at once, or never made; or it
#: was made, taken back, and kept beside the ledger until somebody approves it.
EntryKind = Literal["edit", "undo", "rollback", "refused", "proposed"]
#: A row as it lies in the database.
Columns = dict[str, str | int]

#: The names of a row's columns, in order. The last two are not hashed: they follow from the others.
COLUMNS = (
    "id",
    "time",
    "kind",
    "requests",
    "method",
    "settings",
    "base",
    "before",
    "after",
    "delta",
    "undoes",
    "who",
    "why",
    "scores",
    "versions",
    "previous",
    "public_key",
    "hash",
    "signature",
)
#: What the first row has in the place of the hash of the row before it.
GENESIS = "0" * 64


@dataclass(frozen=True)
class Draft:
    """What is to be recorded, before it has its place in the ledger.

    Args:
        kind: What happened.
        requests: The requests in full, with their metadata.
        method: Name of the editor.
        settings: Its arguments, as JSON types.
        base: The model, with the hash of its weights as they were before.
        before: Fingerprint of the model before, as ``fingerprints.fingerprint`` makes it.
        after: The same after.
        undoes: Numbers of the rows that this one takes back.
        who: Who asked for it.
        why: Why.
        scores: What was measured, as JSON types.
    """

    kind: EntryKind = "edit"
    requests: tuple[EditRequest, ...] = ()
    method: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    base: BaseModelInfo = field(default_factory=BaseModelInfo)
    before: str = ""
    after: str = ""
    undoes: tuple[int, ...] = ()
    who: str = ""
    why: str = ""
    scores: Mapping[str, object] = field(default_factory=dict)

    def columns(self) -> Columns:
        """The columns that are known before the row has its place."""
        return {
            "kind": self.kind,
            "requests": canonical([request.to_dict() for request in self.requests]),
            "method": plain(self.method),
            "settings": canonical(dict(self.settings)),
            "base": canonical(asdict(self.base)),
            "before": self.before,
            "after": self.after,
            "undoes": canonical(list(self.undoes)),
            "who": plain(self.who),
            "why": plain(self.why),
            "scores": canonical(dict(self.scores)),
        }


@dataclass(frozen=True)
class Entry(Draft):
    """A row of a ledger.

    Args:
        kind: ``edit``, ``undo``, ``rollback`` (kept, and taken back since it did harm or its
            result was lost), ``refused`` (never made) or ``proposed`` (made, measured, and taken
            back until it is approved).
        requests: The requests in full, with their metadata.
        method: Name of the editor.
        settings: Its arguments, as JSON types.
        base: The model, with the hash of its weights as they were before.
        before: Fingerprint of the model before: its weights, adapters and memory.
        after: The same after.
        undoes: Numbers of the rows that this one takes back.
        who: Who asked for it.
        why: Why.
        scores: What was measured, as JSON types.
        id: Number of the row, from 1 without gaps.
        time: When it was written, in UTC, as ISO 8601 writes it.
        delta: Hash of the saved edit, which is also the name of its folder; empty where nothing
            is kept.
        versions: Versions of Python and the packages, by name.
        previous: Hash of the row before.
        public_key: Of whoever signed the row, in hexadecimal; empty where nobody did.
        hash: SHA-256 over all of these.
        signature: Of the hash, by Ed25519, in hexadecimal.
    """

    id: int = 0
    time: str = ""
    delta: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    previous: str = ""
    public_key: str = ""
    hash: str = ""
    signature: str = ""

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Ids of the requests."""
        return tuple(request.id for request in self.requests)

    def row(self) -> Columns:
        """The row as it lies in the database."""
        own: Columns = {
            "id": self.id,
            "time": self.time,
            "delta": self.delta,
            "versions": canonical(dict(self.versions)),
            "previous": self.previous,
            "public_key": self.public_key,
            "hash": self.hash,
            "signature": self.signature,
        }
        known = {**self.columns(), **own}
        return {name: known[name] for name in COLUMNS}


def entry_of(row: Mapping[str, str | int]) -> Entry:
    """Reads a row.

    Raises:
        LedgerError: If it is malformed.
    """
    texts = {name: str(row[name]) for name in COLUMNS}
    try:
        records = cast("Sequence[Mapping[str, object]]", json.loads(texts["requests"]))
        kind = texts["kind"]
        if kind not in get_args(EntryKind):
            raise ValueError(f"there is no kind {kind!r}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were warned of when they were made
            requests = tuple(map(EditRequest.from_dict, records))
        return Entry(
            kind=cast(EntryKind, kind),
            requests=requests,
            method=texts["method"],
            settings=dict(json.loads(texts["settings"])),
            base=BaseModelInfo(**json.loads(texts["base"])),
            before=texts["before"],
            after=texts["after"],
            undoes=tuple(int(number) for number in json.loads(texts["undoes"])),
            who=texts["who"],
            why=texts["why"],
            scores=dict(json.loads(texts["scores"])),
            id=int(row["id"]),
            time=texts["time"],
            delta=texts["delta"],
            versions={str(k): str(v) for k, v in json.loads(texts["versions"]).items()},
            previous=texts["previous"],
            public_key=texts["public_key"],
            hash=texts["hash"],
            signature=texts["signature"],
        )
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LedgerError(
            f"Row {texts['id']} of the ledger is damaged ({error}). `lightning-edit ledger verify` "
            "says what else is; restore the ledger from a backup."
        ) from None


def row_hash(columns: Mapping[str, str | int]) -> str:
    """SHA-256 over a row as it lies in the database, in hexadecimal.

    Args:
        columns: The row; its hash and its signature do not count.

    Examples:
        >>> row = dict.fromkeys(COLUMNS, "")
        >>> row_hash(row) == row_hash({**row, "hash": "1", "signature": "2"})
        True
        >>> row_hash(row) == row_hash({**row, "why": "because"})
        False
    """
    content = [[name, columns[name]] for name in COLUMNS[:-2]]
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def canonical(value: object) -> str:
    """JSON in one form only: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def plain(text: str) -> str:
    """A text that UTF-8 can hold: half of a surrogate pair is spelt out."""
    return text.encode("utf-8", "backslashreplace").decode()
