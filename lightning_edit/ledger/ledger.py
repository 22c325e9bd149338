# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The ledger: an append-only record of edits in a database, with the saved edits beside it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from lightning_edit.__about__ import __version__
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import LedgerError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.request import EditRequest
from lightning_edit.core.wrappers import unwrapped
from lightning_edit.ledger.approval import approve
from lightning_edit.ledger.blame import blame
from lightning_edit.ledger.database import Database
from lightning_edit.ledger.deltas import DeltaFolder
from lightning_edit.ledger.entries import (
    GENESIS,
    Columns,
    Draft,
    Entry,
    canonical,
    entry_of,
    row_hash,
)
from lightning_edit.ledger.exporting import export
from lightning_edit.ledger.fingerprints import entries_before, fingerprint
from lightning_edit.ledger.history import History, Standing
from lightning_edit.ledger.outcomes import Blamed, Problem, UndoPlan
from lightning_edit.ledger.recorder import Recorder
from lightning_edit.ledger.signing import Signer, public_key
from lightning_edit.ledger.undo import Undo, held, resumed_editor
from lightning_edit.ledger.verification import problems
from lightning_edit.optim import E

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from lightning_edit.core.batch import PromptTokenizer
    from lightning_edit.modules.base import EditModule

__all__ = ["Ledger"]

_PACKAGES = ("torch", "lightning", "transformers")


class Ledger:
    """An append-only record of edits: what was changed, why and by whom, and the way back.

    A row is never changed or deleted, and carries the hash of the row before it: an undo is a new
    row. The saved edits lie beside the database, in a folder of its name with ``.deltas`` behind
    it. One ledger may know several models: a row tells the fingerprint of the model before and
    after it, by which the edits in a model are found. Several processes may write.

    Args:
        path: The database; made if it is missing.
        who: Who asks for the edits, where the rows do not say otherwise.
        key: PEM file with an Ed25519 key by which rows are signed; ``ledger.signing.new_key`` makes
            one.
        originals: Keep what an edit replaces with it, which an exact undo takes.

    Raises:
        LedgerError: If the database is no ledger, cannot be opened, or is gone while its saved
            edits are there.
        MissingDependencyError: If SQLAlchemy is missing, or cryptography where there is a key.

    Examples:
        >>> from lightning_edit import ROME
        >>> from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer
        >>> ledger = Ledger(getfixture("tmp_path") / "ledger.db", who="anna")
        >>> editor = ROME.from_model(tiny_model(), tiny_tokenizer(), layers=[1], steps=3)
        >>> with ledger.recording(editor, why="ticket 7"):
        ...     for request in tiny_requests(2):
        ...         editor.commit(editor.edit(request))
        >>> [(entry.id, entry.kind, entry.request_ids) for entry in ledger.entries()]
        [(1, 'edit', ('capital-velmora',)), (2, 'edit', ('language-velmora',))]
        >>> ledger.undo(editor, 1)[0].undoes
        (1,)
        >>> ledger.verify()
        []
    """

    def __init__(
        self,
        path: str | Path,
        *,
        who: str = "",
        key: str | Path | None = None,
        originals: bool = True,
    ) -> None:
        self.path = Path(path)
        self.who = who
        self.originals = originals
        self.deltas = DeltaFolder(self.path.with_name(f"{self.path.name}.deltas"))
        self._signer = None if key is None else Signer(key)
        if not self.path.exists() and self.deltas.strays(()):
            raise LedgerError(
                f"There is no `{self.path}`, but `{self.deltas.folder}` holds saved edits of it. "
                "Restore the database from a backup, or give another path."
            )
        self._database = Database(self.path)
        self._sweep()

    def __len__(self) -> int:
        last = self._last()
        return 0 if last is None else int(last["id"])

    def __repr__(self) -> str:
        return f"Ledger({str(self.path)!r}: {len(self)} rows)"

    @property
    def head(self) -> str:
        """Hash of the last row, which stands for all: keep it elsewhere to compare with later."""
        last = self._last()
        return GENESIS if last is None else str(last["hash"])

    # -- reading -----------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All rows, in order.

        Raises:
            LedgerError: If one of them is malformed.
        """
        with self._database.reading() as connection:
            return [entry_of(row) for row in self._database.rows(connection)]

    def entry(self, number: int) -> Entry:
        """The row of a number.

        Raises:
            LedgerError: If there is none.
        """
        with self._database.reading() as connection:
            for row in self._database.rows(connection, number):
                return entry_of(row)
        raise LedgerError(f"`{self.path}` has no row {number}. It has {len(self)}.")

    def edit(self, number: int) -> Edit:
        """The saved edit of a row, whose content is what the row says.

        Raises:
            LedgerError: If there is no such row, it keeps no edit, or the edit was changed.
        """
        entry = self.entry(number)
        if not entry.delta:
            raise LedgerError(f"Row {number} ({entry.kind}) keeps no edit.")
        return self.deltas.load(entry.delta)

    def standing(self, model: nn.Module) -> tuple[Standing, ...]:
        """The edits that are in a model, in order, as far as the ledger knows them.

        Args:
            model: A model, or an editor of one.
        """
        return self.standing_at(fingerprint(held(model)))

    def standing_at(self, state: str) -> tuple[Standing, ...]:
        """The edits that are in a model of a fingerprint, in order.

        Args:
            state: Of the model, as the rows name it.
        """
        return History(self.entries()).at(state).standing

    def verify(self, *, key: str | Path | None = None, head: str = "") -> list[Problem]:
        """What is not as it was written: rows, their order and number, saved edits, signatures.

        Args:
            key: The public key by which every row must be signed: in hexadecimal, or a PEM file.
                Without it, signatures are compared with the key that each row names.
            head: Hash of a row that was the last one at some time, which must be there still.

        Returns:
            Nothing where all is well.
        """
        known = None if key is None else public_key(key)
        with self._database.reading() as connection:
            return list(problems(self._database, connection, self.deltas, known, head))

    def export(self, path: str | Path, *, force: bool = False) -> int:
        """Writes all rows as JSON lines, or as CSV, by the name of the file.

        Args:
            path: A file that ends with ``.jsonl`` or ``.csv``.
            force: Replace a file that is there.

        Returns:
            The number of rows.

        Raises:
            LedgerError: If the file is there, or its name ends otherwise.
        """
        return export(self.entries(), Path(path), force=force)

    # -- writing -----------------------------------------------------------------------------

    def append(self, draft: Draft, edit: Edit | None = None) -> Entry:
        """Adds a row, and the saved edit that it names, as one.

        A row that is there already (the same requests, method and fingerprints, and not taken back
        since) is not written again: so a run that was killed before its checkpoint was written, and
        makes the edit again, leaves one row.

        Args:
            draft: What is to be recorded.
            edit: What was changed, with what it replaced.

        Returns:
            The row, or the one that was there.
        """
        columns = replace(draft, who=draft.who or self.who).columns()
        with self._database.writing() as connection:
            known = self._known(connection, columns)
            return self._add(connection, columns, edit) if known is None else known

    def record(
        self,
        edit: Edit,
        model: nn.Module,
        *,
        requests: Sequence[EditRequest] = (),
        scores: dict[str, object] | None = None,
        who: str = "",
        why: str = "",
    ) -> Entry:
        """Records an edit that stands in a model, such as one that was just applied.

        Args:
            edit: The edit.
            model: The model with it.
            requests: The requests in full; those that the edit knows when empty.
            scores: What was measured, as JSON types.
            who: Who asked for it.
            why: Why.

        Returns:
            The row.

        Raises:
            LedgerError: If it is not known what the edit replaced.
        """
        if not edit.keeps_originals:
            raise LedgerError(
                "It is not known what the edit replaced: it was not applied here. Apply it first "
                "(`edit.apply_(model)`), or record what an editor commits (`ledger.recording`)."
            )
        model = unwrapped(model)
        originals = edit.originals if isinstance(edit, WeightDelta) else None
        entries = entries_before(edit, model) if isinstance(edit, MemoryWrite) else None
        weights = weight_hash(model, originals)
        before = fingerprint(model, weights, entries)
        known = [request for batch in edit.batches if batch for request in batch.requests]
        about = edit.provenance
        base = replace(about.base, sha256=weights)
        draft = Draft(
            "edit",
            tuple(requests or known or about.requests),
            about.method,
            about.settings,
            base,
            before,
            fingerprint(model),
            (),
            who,
            why,
            scores or {},
        )
        return self.append(draft, edit)

    def note(
        self,
        kind: Literal["refused", "rollback"],
        requests: Sequence[EditRequest],
        model: nn.Module,
        *,
        who: str = "",
        why: str = "",
        scores: dict[str, object] | None = None,
    ) -> Entry:
        """Records that an edit was not made, or was taken back at once: the model is as it was.

        Args:
            kind: Which of these.
            requests: What was asked for.
            model: The model.
            who: Who asked for it.
            why: Why it was refused or taken back.
            scores: What was measured, as JSON types.
        """
        now = fingerprint(held(model))
        return self.append(
            Draft(
                kind, tuple(requests), before=now, after=now, who=who, why=why, scores=scores or {}
            )
        )

    @contextmanager
    def recording(
        self,
        editor: EditModule[E],
        *,
        who: str = "",
        why: str = "",
        measure: bool = False,
        propose: bool = False,
    ) -> Iterator[Recorder[E]]:
        """Context manager: records every edit that an editor commits inside it.

        What ``undo`` takes out has its row; what ``editor.remove`` takes out by itself has none.

        Args:
            editor: The editor, once its model is there.
            who: Who asks for the edits.
            why: Why.
            measure: Whether each request is measured before its edit, too.
            propose: Whether each edit is taken back once it is saved, until ``approve`` keeps it.
        """
        recorder = Recorder(self, editor, who=who, why=why, measure=measure, propose=propose)
        recorder.start()
        try:
            yield recorder
        finally:
            recorder.stop()

    def approve(self, model: nn.Module, number: int, *, who: str = "", why: str = "") -> Entry:
        """Writes a proposed edit into a model, and records that it is kept.

        Into the model that it was proposed for, it is written bit for bit as it was measured. Where
        other edits came into that model since, the weights become original + all changes, rounded
        once, and a memory gets its entries; it was not measured together with them.

        Args:
            model: The model that it was proposed for, or that with later edits which this ledger
                knows.
            number: Row of the proposal.
            who: Who approves it.
            why: Why.

        Returns:
            The row of the edit.

        Raises:
            LedgerError: If the row is no proposal, was made for another model, or is in this one
                already. The model is as it was then.
        """
        return approve(self, model, number, who=who, why=why)

    # -- taking out --------------------------------------------------------------------------

    def plan(
        self,
        model: nn.Module,
        number: int | None = None,
        *,
        to: int | None = None,
        everything: bool = False,
    ) -> list[UndoPlan]:
        """What ``undo`` with these arguments costs, without doing it."""
        return Undo(self, model).plans(number, to=to, everything=everything)

    def undo(
        self,
        model: nn.Module,
        number: int | None = None,
        *,
        to: int | None = None,
        everything: bool = False,
        who: str = "",
        why: str = "",
    ) -> list[Entry]:
        """Takes edits out of a model, and records that.

        The last edit goes bit for bit: what it replaced is put back. One in the middle goes by the
        editor that committed it, which makes the others again as if it had never been; where only
        the model is given, the weights become original + the other changes, rounded once, and a
        memory forgets the edit. What it costs is logged first.

        Args:
            model: The model, or the editor that committed the edits.
            number: Row of the edit; that of the last one when nothing is named.
            to: Row of an edit after which all are taken out, the last one first.
            everything: Take out all that the ledger knows in the model.
            who: Who asked for it.
            why: Why.

        Returns:
            The rows that were written, one for each edit.

        Raises:
            LedgerError: If the ledger knows no such edit in this model, or cannot take it out. The
                model is as it was then, or as after the last row that was written.
        """
        return Undo(self, model).run(number, to=to, everything=everything, who=who, why=why)

    def editor(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, **settings: object
    ) -> EditModule[Edit]:
        """An editor that goes on from the edits which a model holds, as if it had committed them.

        Args:
            model: The model, whose edits are all of one method with the same settings.
            tokenizer: Its fast tokenizer.
            settings: Arguments that overrule those of the rows.

        Raises:
            LedgerError: If the ledger knows no edits in the model, or they are of several methods.
        """
        return resumed_editor(self, model, tokenizer, settings)

    def blame(
        self,
        model: nn.Module,
        prompt: str,
        tokenizer: PreTrainedTokenizerBase | PromptTokenizer | None = None,
        *,
        answer: str = "",
        threshold: float = 0.05,
    ) -> Blamed:
        """Which edits changed the answer to a prompt: each is taken out by itself, and measured.

        Args:
            model: The model, or an editor of it. It is as it was when this returns.
            prompt: What to ask.
            tokenizer: The model's; an editor has its own.
            answer: The answer whose probability is measured; what the model says when empty.
            threshold: Change of the probability from which on an edit is named as a cause.

        Raises:
            LedgerError: If the ledger knows no edit in the model.
        """
        return blame(self, model, prompt, tokenizer, answer=answer, threshold=threshold)

    # -- inside ------------------------------------------------------------------------------

    def _last(self) -> Columns | None:
        with self._database.reading() as connection:
            return self._database.last(connection)

    def _known(self, connection: Connection, columns: Columns) -> Entry | None:
        """The row that says the same, unless it was taken back since."""
        names = ["kind", "requests", "method", "before", "after", "undoes"]
        names += ["why"] if columns["kind"] in ("refused", "rollback") else []
        for row in self._database.alike(connection, {name: columns[name] for name in names}):
            entry = entry_of(row)
            if entry.id not in self._database.undone(connection, after=entry.id):
                return entry
        return None

    def _add(self, connection: Connection, columns: Columns, edit: Edit | None) -> Entry:
        last = self._database.last(connection)
        # The saved edit is on the disk before the row that names it; the lock keeps other processes
        # from taking it for something that was left over.
        delta = "" if edit is None else self.deltas.write(edit, originals=self.originals)
        row: Columns = {
            **columns,
            "id": 1 if last is None else int(last["id"]) + 1,
            "time": datetime.now(UTC).isoformat(timespec="microseconds"),
            "delta": delta,
            "versions": _versions(),
            "previous": GENESIS if last is None else last["hash"],
            "public_key": "" if self._signer is None else self._signer.public_key,
        }
        row["hash"] = row_hash(row)
        row["signature"] = "" if self._signer is None else self._signer.sign(str(row["hash"]))
        self._database.add(connection, row)
        return entry_of(row)

    def _sweep(self) -> None:
        """Deletes saved edits that an interrupted process has left without a row."""
        if not self.deltas.strays(self._deltas()):
            return
        with self._database.writing() as connection:
            rows = list(self._database.rows(connection))
            is_whole = self._database.ever(connection) == len(rows)
            if not is_whole or any(row_hash(row) != row["hash"] for row in rows):
                return  # rows were tampered with, and this may be all that is left of them
            for path in self.deltas.strays({str(row["delta"]) for row in rows}):
                shutil.rmtree(path, ignore_errors=True)

    def _deltas(self) -> set[str]:
        with self._database.reading() as connection:
            return {str(row["delta"]) for row in self._database.rows(connection)}


def _versions() -> str:
    found = {"python": platform.python_version(), "lightning-edit": __version__}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return canonical(found)
