# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits that are proposed are measured and saved, and in no model until somebody approves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_edit import (
    EditCheckpoint,
    EditDataModule,
    EditGuard,
    EditLedger,
    FullTuning,
    Ledger,
    load_model,
)
from lightning_edit.__main__ import main
from lightning_edit.core.errors import LedgerError
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.ledger.fingerprints import fingerprint
from tests.contract.enumeration import EDITORS, quick_editor
from tests.modules.helpers import bare_trainer

pytest.importorskip("sqlalchemy")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*edits did not take:UserWarning"),
    pytest.mark.filterwarnings("ignore:EditGuard:UserWarning"),
]

REQUESTS = tiny_requests(3)


def proposed(editor: Any, folder: Path, *callbacks: Any, ckpt: Path | None = None) -> Ledger:
    """The ledger of a run that only proposes."""
    recorder = EditLedger(str(folder / "ledger.db"), who="anna", propose=True)
    trainer = bare_trainer(
        max_epochs=1,
        callbacks=[recorder, *callbacks, EditCheckpoint(str(folder))],
        enable_checkpointing=True,
    )
    trainer.fit(editor, EditDataModule(requests=REQUESTS), ckpt_path=ckpt, weights_only=bool(ckpt))
    return Ledger(folder / "ledger.db")


@pytest.mark.parametrize("name", ["ROME", "AlphaEdit", "GRACE"])
def test_what_is_proposed_is_in_no_model_until_it_is_approved(name: str, tmp_path: Path) -> None:
    editor, alone = quick_editor(EDITORS[name]), quick_editor(EDITORS[name])
    base = fingerprint(editor.model)
    ledger = proposed(editor, tmp_path)
    assert fingerprint(editor.model) == base
    assert not editor.target.request_ids
    rows = ledger.entries()
    assert [(r.kind, r.request_ids, r.before) for r in rows] == [
        ("proposed", (request.id,), base) for request in REQUESTS
    ]
    for row in rows:
        assert row.scores["before"].keys() == row.scores["after"].keys()  # type: ignore[attr-defined]
    assert ledger.standing(editor) == ()
    # Resumed at its end, and run anew, it proposes nothing twice.
    proposed(quick_editor(EDITORS[name]), tmp_path, ckpt=tmp_path / "last.ckpt")
    proposed(quick_editor(EDITORS[name]), tmp_path)
    assert len(ledger) == 3

    model = trained_tiny_model()[0]
    row = ledger.approve(model, 2, who="bob")
    alone.commit(alone.edit(REQUESTS[1]))
    assert row.after == rows[1].after == fingerprint(model) == fingerprint(alone.model)
    assert (row.kind, row.who, row.why) == ("edit", "bob", "approval of row 2")
    assert (row.requests, row.scores) == (rows[1].requests, rows[1].scores)
    # Another one joins it, and each of them can be taken out again.
    second = ledger.approve(model, 1)
    assert [one.entry.id for one in ledger.standing(model)] == [row.id, second.id]
    ledger.undo(model)
    assert fingerprint(model) == row.after
    ledger.undo(model)
    assert fingerprint(model) == base
    assert ledger.verify() == []


def test_what_cannot_be_approved_is_refused(tmp_path: Path) -> None:
    ledger = proposed(quick_editor(EDITORS["ROME"]), tmp_path)
    editor = quick_editor(EDITORS["ROME"])
    model = editor.model
    row = ledger.approve(model, 1)
    now = fingerprint(model)
    other = quick_editor(EDITORS["ROME"])
    other.commit(other.edit(REQUESTS[2]))
    for target, number, said in (
        (model, 1, r"Row 1 is in this model already, by row 4\."),
        (model, row.id, r"Row 4 \(edit\) is no proposal"),
        (editor, 2, "An editor does not go on"),
        (other.model, 2, "does not know to stem from it"),
    ):
        with pytest.raises(LedgerError, match=said):
            ledger.approve(target, number)
    assert fingerprint(model) == now
    assert len(ledger) == 4
    with pytest.raises(LedgerError, match="What FullTuning learns cannot be proposed"):
        proposed(quick_editor(FullTuning), tmp_path / "other")


def test_what_breaks_a_budget_is_no_proposal(tmp_path: Path) -> None:
    for order in (1, -1):
        folder = tmp_path / str(order)
        guard = EditGuard(relative_norm=1e-9, on_breach="continue")
        recorder = EditLedger(str(folder / "ledger.db"), propose=True)
        editor = quick_editor(EDITORS["ROME"])
        before = fingerprint(editor.model)
        trainer = bare_trainer(max_epochs=1, callbacks=[guard, recorder][::order])
        trainer.fit(editor, EditDataModule(requests=REQUESTS[:2]))
        ledger = Ledger(folder / "ledger.db")
        assert [row.kind for row in ledger.entries()] == ["rollback", "rollback"]
        assert len(guard.breaches) == 2
        assert fingerprint(editor.model) == before
        # Within its budget it is measured with the edit, and proposed.
        guard = EditGuard(relative_norm=1e9)
        trainer = bare_trainer(max_epochs=1, callbacks=[guard, recorder][::order])
        trainer.fit(editor, EditDataModule(requests=REQUESTS[:1]))
        assert guard.figures["relative_norm"] > 0
        assert [row.kind for row in ledger.entries()][2:] == ["proposed"]
        assert fingerprint(editor.model) == before


def test_a_proposal_becomes_a_model_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-edit"])
    model, tokenizer = trained_tiny_model()
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    for name in ("ROME", "GRACE"):
        ledger = Ledger(f"{name}.db")
        editor = EDITORS[name].from_model(load_model("base"), tokenizer, layers=[1], steps=3)
        with ledger.recording(editor, propose=True):
            for request in REQUESTS[:2]:
                editor.commit(editor.edit(request))
        assert [row.kind for row in ledger.entries()] == ["proposed", "proposed"]
        words = ["ledger", "approve", f"{name}.db"]
        assert main([*words, "1", "--output", f"{name}-1", "--who", "bob"]) == 0
        assert f"Wrote the model with the edit to {name}-1" in capsys.readouterr().out
        assert fingerprint(load_model(f"{name}-1")) == ledger.entry(1).after
        assert main([*words, "2", "--model", f"{name}-1", "--output", f"{name}-2"]) == 0
        standing = ledger.standing(load_model(f"{name}-2"))
        assert [one.entry.id for one in standing] == [3, 4]
        assert (ledger.entry(3).who, ledger.verify()) == ("bob", [])
        assert main([*words, "1", "--output", f"{name}-1"]) == 1
        assert "is not empty" in capsys.readouterr().err
