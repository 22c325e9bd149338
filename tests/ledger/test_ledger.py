# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A ledger holds every edit once, finds what was tampered with, and leads back."""

from __future__ import annotations

import csv
import errno
import json
import operator
import shutil
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest

from lightning_edit import ROME, EditRequest, Ledger
from lightning_edit.core.errors import LedgerError
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer
from lightning_edit.ledger.entries import COLUMNS, Draft
from lightning_edit.ledger.fingerprints import fingerprint
from lightning_edit.ledger.signing import new_key, public_key
from tests.processes import run_process

pytestmark = pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning")


def raw(path: Path, *statements: str) -> None:
    """Writes past the ledger, as somebody would who wants nobody to see it."""
    with closing(sqlite3.connect(path)) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
        kept = triggers.fetchall()
        for name, _ in kept:
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        for _, sql in kept:
            connection.execute(sql)
        connection.commit()


def test_a_row_tells_all_there_is(written: Path) -> None:
    ledger = Ledger(written / "ledger.db")
    first, second, third = ledger.entries()
    assert len(ledger) == 3
    assert ledger.head == third.hash
    assert (first.id, first.kind, first.who, first.why) == (1, "edit", "anna", "ticket 7")
    assert first.requests == (tiny_requests(1)[0],)
    assert (first.method, first.settings["layers"], first.settings["steps"]) == ("ROME", [1], 2)
    assert first.before == first.base.sha256 == fingerprint(tiny_model())
    assert (first.after, second.after) == (second.before, third.before)
    assert first.time.endswith("+00:00")
    assert {"python", "torch", "lightning-edit"} <= set(first.versions)
    assert second.previous == first.hash
    assert first.public_key == public_key(written / "key.pem")
    assert len({entry.delta for entry in (first, second, third)}) == 3
    assert {path.name for path in ledger.deltas.folder.iterdir()} == {
        entry.delta for entry in ledger.entries()
    }
    with pytest.raises(LedgerError, match=r"has no row 4\. It has 3"):
        ledger.entry(4)


def test_the_saved_edits_lead_from_one_model_to_the_next_and_back(written: Path) -> None:
    ledger, model = Ledger(written / "ledger.db"), tiny_model()
    for entry in ledger.entries():
        # Original + the sum of all changes, rounded once, as an editor writes them.
        total = reduce(operator.add, [ledger.edit(n) for n in range(1, entry.id + 1)])
        with total.applied(model):
            assert fingerprint(model) == entry.after
            assert [one.entry.id for one in ledger.standing(model)] == [*range(1, entry.id + 1)]
            if entry.id > 1:
                with ledger.edit(entry.id).reverted(model):
                    assert fingerprint(model) == entry.before
    assert ledger.standing(model) == ()


def test_rows_are_neither_changed_nor_deleted_nor_put_between(written: Path) -> None:
    with closing(sqlite3.connect(written / "ledger.db")) as connection:
        for statement in (
            "UPDATE edits SET who = 'bob'",
            "DELETE FROM edits WHERE id = 3",
            "INSERT OR REPLACE INTO edits SELECT * FROM edits WHERE id = 2",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="rows of a ledger are"):
                connection.execute(statement)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_whatever_is_changed_is_found(written: Path, subtests: pytest.Subtests) -> None:
    path = written / "ledger.db"
    key = public_key(written / "key.pem")
    assert Ledger(path).verify(key=key) == []
    kept = path.read_bytes()
    for column in COLUMNS[1:]:
        with subtests.test(column):
            path.write_bytes(kept)
            change = f"{column} = replace({column} || '0', '1', '2')"
            raw(path, "UPDATE edits SET " + change + " WHERE id = 2")  # noqa: S608
            found = Ledger(path).verify()
            assert any(problem.row == 2 for problem in found), found
    for what, statement, row in (
        ("middle", "DELETE FROM edits WHERE id = 2", 2),
        ("end", "DELETE FROM edits WHERE id = 3", 3),
        ("renumbered", "UPDATE edits SET id = id - 1 WHERE id > 1", 1),
        ("unsigned", "UPDATE edits SET signature = '' WHERE id = 1", 1),
        ("no text", "UPDATE edits SET settings = 'x' WHERE id = 3", 3),
    ):
        with subtests.test(what):
            path.write_bytes(kept)
            if what == "renumbered":
                raw(path, "DELETE FROM edits WHERE id = 1", statement)
            else:
                raw(path, statement)
            assert any(problem.row == row for problem in Ledger(path).verify()), what
    path.write_bytes(kept)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER edits_keep_delete")
    assert "edits_keep_delete" in str(Ledger(path).verify()[0])


def test_rows_that_were_written_anew_are_known_by_the_key_or_the_head(written: Path) -> None:
    ledger = Ledger(written / "ledger.db")
    head, key = ledger.head, public_key(written / "key.pem")
    other = new_key(written / "other.pem")
    forged = Ledger(written / "forged.db", key=written / "other.pem")
    for entry in ledger.entries():
        draft = Draft(**{n: getattr(entry, n) for n in Draft.__dataclass_fields__})
        forged.append(replace(draft, who="nobody"))
    assert forged.verify() == []
    assert "no row has the hash" in str(forged.verify(head=head)[-1])
    assert "signed by another key" in str(forged.verify(key=key)[0])
    assert forged.verify(key=other) == []
    plain = Ledger(written / "plain.db")
    plain.append(Draft())
    assert "not signed" in str(plain.verify(key=key)[0])


def test_a_saved_edit_that_was_changed_or_is_gone_is_found(
    written: Path, subtests: pytest.Subtests
) -> None:
    ledger = Ledger(written / "ledger.db")
    folder = ledger.deltas.path(ledger.entry(2).delta)
    for file in sorted(folder.iterdir()):
        with subtests.test(file.name):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            kept = file.read_bytes()
            file.write_bytes(content)
            [problem] = ledger.verify()
            assert problem.row == 2
            assert "was changed" in problem.what
            with pytest.raises(LedgerError, match="was changed"):
                ledger.edit(2)
            file.write_bytes(kept)
    shutil.rmtree(folder)
    assert "is missing" in str(ledger.verify()[0])


def test_names_of_saved_edits_lead_nowhere_else(written: Path) -> None:
    path = written / "ledger.db"
    raw(path, "UPDATE edits SET delta = '../../elsewhere' WHERE id = 1")
    ledger = Ledger(path)
    assert any("is no hash of a saved edit" in str(problem) for problem in ledger.verify())
    with pytest.raises(LedgerError, match="is no hash of a saved edit"):
        ledger.edit(1)


def test_the_same_is_written_once_until_it_was_taken_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    [request] = tiny_requests(1)
    draft = Draft("edit", (request,), "ROME", before="a", after="b")
    assert ledger.append(draft).id == ledger.append(draft).id == 1
    assert ledger.append(replace(draft, after="c")).id == 2
    assert ledger.append(replace(draft, requests=(replace(request, id="x"),))).id == 3
    undo = Draft("undo", (request,), before="b", after="a", undoes=(1,))
    assert ledger.append(undo).id == ledger.append(undo).id == 4
    assert ledger.append(draft).id == ledger.append(draft).id == 5
    assert [one.entry.id for one in ledger.standing_at("b")] == [5]
    assert ledger.standing_at("a") == ()


def test_texts_come_back_as_they_were(tmp_path: Path) -> None:
    odd = "=1+1; DROP TABLE edits;-- \x00 ' \" 🜁 \udc80 </script>"
    request = EditRequest(f"{odd} is", odd, "x", metadata={"by": odd, "n": [1, None]}, id=odd)
    ledger = Ledger(tmp_path / "ledger.db", who=odd)
    entry = ledger.append(Draft(requests=(request,), why=odd))
    assert entry == ledger.entry(1)
    assert entry.requests == (request,)
    assert entry.why == entry.who == odd.encode("utf-8", "backslashreplace").decode()
    assert ledger.verify() == []
    assert ledger.export(tmp_path / "rows.jsonl") == 1
    assert json.loads((tmp_path / "rows.jsonl").read_text())["requests"][0]["id"] == odd
    ledger.export(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    assert row["why"] == f"'{entry.why}"  # no formula for a program of tables
    for name, said in (("rows.csv", "is there already"), ("rows.txt", "end with .jsonl or .csv")):
        with pytest.raises(LedgerError, match=said):
            ledger.export(tmp_path / name)
    ledger.export(tmp_path / "rows.csv", force=True)


def write_rows(path: str, name: str) -> None:
    """What a process of its own does: ten rows."""
    ledger = Ledger(path, who=name)
    for i in range(10):
        ledger.append(Draft(before=name, after=str(i)))


def both(path: str) -> None:
    import multiprocessing

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_rows, args=(path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_two_processes_write_at_the_same_time(tmp_path: Path) -> None:
    done = run_process(both, str(tmp_path / "ledger.db"))
    assert done.returncode == 0, done.stderr
    ledger = Ledger(tmp_path / "ledger.db")
    entries = ledger.entries()
    assert [entry.id for entry in entries] == list(range(1, 21))
    assert sorted((e.who, e.after) for e in entries) == [
        (w, str(i)) for w in "ab" for i in range(10)
    ]
    assert ledger.verify() == []


def test_what_an_interrupted_process_left_is_cleaned_up(written: Path) -> None:
    ledger = Ledger(written / "ledger.db")
    folder = ledger.deltas.folder
    names = {path.name for path in folder.iterdir()}
    shutil.copytree(folder / ledger.entry(1).delta, folder / ("0" * 64))
    (folder / ".new-abc").mkdir()
    (folder / "notes").mkdir()
    Ledger(written / "ledger.db")
    assert {path.name for path in folder.iterdir()} == {*names, "notes"}
    # Where rows were taken away, what they kept may be all that is left of them.
    raw(written / "ledger.db", "DELETE FROM edits WHERE id = 3")
    Ledger(written / "ledger.db")
    assert {path.name for path in folder.iterdir()} == {*names, "notes"}
    (written / "ledger.db").unlink()
    with pytest.raises(LedgerError, match="holds saved edits of it"):
        Ledger(written / "ledger.db")
    assert not (written / "ledger.db").exists()


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("It is no database. " * 100)
    with pytest.raises(LedgerError, match="not a database"):
        Ledger(tmp_path / "text.db")
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE other (id)")
    with pytest.raises(LedgerError, match="is a database, but no ledger"):
        Ledger(tmp_path / "other.db")
    Ledger(tmp_path / "newer.db")
    with closing(sqlite3.connect(tmp_path / "newer.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(LedgerError, match="layout 99"):
        Ledger(tmp_path / "newer.db")
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(LedgerError, match="cannot be read"):
        Ledger(tmp_path / "new.db", key=tmp_path / "key.pem")
    with pytest.raises(LedgerError, match="unable to open"):
        Ledger(tmp_path)


def test_an_edit_that_was_applied_is_recorded(tmp_path: Path) -> None:
    ledger, model = Ledger(tmp_path / "ledger.db"), tiny_model()
    before = fingerprint(model)
    editor = ROME.from_model(model, tiny_tokenizer(), layers=[1], steps=2, cache_dir=str(tmp_path))
    edit = editor.edit(tiny_requests(1))
    with pytest.raises(LedgerError, match="Apply it first"):
        ledger.record(edit, model)
    edit.apply_(model)
    entry = ledger.record(edit, model, who="bob", why="by hand", scores={"p": 1.0})
    assert (entry.before, entry.after) == (before, fingerprint(model))
    assert entry.requests == tuple(tiny_requests(1))
    assert (entry.who, entry.scores) == ("bob", {"p": 1.0})
    assert ledger.record(edit, model) == entry
    assert ledger.note("rollback", tiny_requests(1), model, why="it did harm").kind == "rollback"
    assert [one.entry.id for one in ledger.standing(model)] == [1]
    [row] = ledger.undo(model)
    assert (row.kind, row.undoes, row.after) == ("undo", (1,), before)
    assert fingerprint(model) == before
    assert ledger.verify() == []


def test_a_full_disk_is_told_and_nothing_is_left(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, model = Ledger(written / "ledger.db"), tiny_model()
    edit = ledger.edit(1)
    edit.apply_(model)
    names = {path.name for path in ledger.deltas.folder.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(LedgerError, match="No space left"):
            ledger.record(edit, model, why="again", requests=tiny_requests(2))
    assert len(ledger) == 3
    assert {path.name for path in ledger.deltas.folder.iterdir()} == names
    assert ledger.record(edit, model, why="again", requests=tiny_requests(2)).id == 4
    assert ledger.verify() == []
