# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The verbs of ``lightning-edit ledger`` on the ledger of a run, and on the model that it left."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from lightning_edit import GRACE, ROME, Ledger, load_model
from lightning_edit.__main__ import main
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.ledger.fingerprints import fingerprint
from lightning_edit.ledger.verbs import blame, undo

pytestmark = pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning")


def made(folder: Path, cls: type = ROME) -> Ledger:
    """A folder with ``base``, ``ledger.db`` of two edits, and ``edited``, as `apply` writes it."""
    model, tokenizer = trained_tiny_model()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = load_model(str(folder / "base"))
    editor = cls.from_model(model, tokenizer, layers=[0], steps=5)  # type: ignore[attr-defined]
    ledger = Ledger(folder / "ledger.db", who="anna")
    with ledger.recording(editor, why="ticket\x1b[31m"):
        for request in tiny_requests(2):
            editor.commit(editor.edit(request))
    editor.committed().save(folder / "delta")
    assert main(["apply", str(folder / "delta"), "--output", str(folder / "edited")]) == 0
    return ledger


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-edit"])


def test_rows_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    ledger = made(Path())
    capsys.readouterr()
    assert main(["ledger", "list", "ledger.db"]) == 0
    said = capsys.readouterr().out
    assert "capital-velmora: The capital of Velmora is → Kettleby" in said
    assert "ticket␛[31m" in said  # what steers a terminal is shown, not sent
    assert main(["ledger", "show", "ledger.db", "2"]) == 0
    assert ledger.entry(2).delta in capsys.readouterr().out
    assert main(["ledger", "verify", "ledger.db", "--head", ledger.head]) == 0
    assert ledger.head in capsys.readouterr().out
    assert main(["ledger", "export", "ledger.db", "rows.jsonl"]) == 0
    assert len(Path("rows.jsonl").read_text().splitlines()) == 2
    assert json.loads(Path("rows.jsonl").read_text().splitlines()[0])["who"] == "anna"
    with closing(sqlite3.connect("ledger.db")) as connection:
        connection.execute("DROP TRIGGER edits_keep_update")
        connection.execute("UPDATE edits SET who = 'bob' WHERE id = 1")
        connection.commit()
    assert main(["ledger", "verify", "ledger.db"]) == 1
    assert "row 1: it was changed" in capsys.readouterr().err


@pytest.mark.parametrize("cls", [ROME, GRACE])
def test_edits_come_out_of_a_model_in_a_folder(cls: type) -> None:
    ledger = made(Path(), cls)
    assert fingerprint(load_model("edited")) == ledger.entry(2).after
    told = undo("ledger.db", 1, dry_run=True)
    assert (told.folder, told.entries, len(ledger)) == (None, (), 2)
    assert [row.entry.id for row in blame("ledger.db", "Who", answer="Dorin").rows] == [1, 2]
    done = undo("ledger.db", 1, output="without_1", why="wrong")
    assert done.folder == Path("without_1")
    assert [one.entry.id for one in ledger.standing(load_model("without_1"))] == [2]
    assert main(["ledger", "undo", "ledger.db", "--all", "--model", "without_1"]) == 0
    assert fingerprint(load_model("restored")) == fingerprint(load_model("base"))
    undo("ledger.db", 1, output="again", again=True)
    assert [one.entry.id for one in ledger.standing(load_model("again"))] == [2]
    assert ledger.verify() == []


def test_what_is_wrong_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, status, said in (
        (["list", "nowhere.db"], 1, "There is no ledger `nowhere.db`"),
        (["lst"], 2, "there is no verb 'lst'. Did you mean `list`?"),
    ):
        try:
            found = main(["ledger", *words])
        except SystemExit as end:
            found = int(end.code or 0)
        assert found == status
        assert said in capsys.readouterr().err
    assert not Path("nowhere.db").exists()
    assert main(["ledger"]) == 0
    assert "usage: lightning-edit ledger VERB" in capsys.readouterr().out
