# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A run's edits are in its ledger, each once, whatever happens to the run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_edit import (
    EditCheckpoint,
    EditDataModule,
    EditEvaluator,
    EditLedger,
    FullTuning,
    Ledger,
    WeightDelta,
)
from lightning_edit.core.errors import LedgerError, RequestError
from lightning_edit.demos import tiny_requests
from lightning_edit.ledger.fingerprints import fingerprint
from tests.callbacks.foreign import data_of, foreign
from tests.contract.enumeration import EDITORS, quick_editor
from tests.modules.helpers import bare_trainer

pytest.importorskip("sqlalchemy")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*dirpath.*exists and is not empty:UserWarning"),
]

METHODS = ("ROME", "GRACE", "LoRA")


def fit(editor: Any, requests: Any, folder: Path, ckpt: Path | None = None, **settings: Any) -> Any:
    """A run with a ledger and a checkpoint an edit."""
    recorder = EditLedger(str(folder / "ledger.db"), **settings)
    trainer = bare_trainer(
        max_epochs=1,
        callbacks=[EditCheckpoint(str(folder)), recorder],
        enable_checkpointing=True,
    )
    trainer.fit(editor, EditDataModule(requests=requests), ckpt_path=ckpt, weights_only=bool(ckpt))
    return editor


@pytest.mark.parametrize("name", METHODS)
def test_every_edit_of_a_run_is_a_row(name: str, tmp_path: Path) -> None:
    requests = [replace(r, metadata={"ticket": 7}) for r in tiny_requests(3)]
    editor = quick_editor(EDITORS[name])
    before = fingerprint(editor.model)
    fit(editor, requests, tmp_path, who="anna", why="ticket 7")
    ledger = Ledger(tmp_path / "ledger.db")
    entries = ledger.entries()
    assert [entry.requests for entry in entries] == [(r,) for r in requests]
    states = [before, *(entry.after for entry in entries)]
    assert [entry.before for entry in entries] == states[:-1]
    assert states[-1] == fingerprint(editor.model)
    assert {(e.kind, e.method, e.who, e.why) for e in entries} == {
        ("edit", name, "anna", "ticket 7")
    }
    for entry in entries:
        assert entry.scores["before"].keys() == entry.scores["after"].keys()  # type: ignore[attr-defined]
    assert ledger.verify() == []
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["EditLedger"]
    assert (saved["rows"], saved["head"]) == (3, ledger.head)
    # Resumed at its end, and begun anew on the same base, the run adds nothing.
    fit(quick_editor(EDITORS[name]), requests, tmp_path, tmp_path / "last.ckpt")
    fit(quick_editor(EDITORS[name]), requests, tmp_path)
    assert len(ledger) == 3
    [row] = ledger.undo(editor)
    assert row.after == entries[1].after


def test_a_checkpoint_knows_its_ledger(tmp_path: Path) -> None:
    requests = tiny_requests(2)
    fit(quick_editor(EDITORS["ROME"]), requests, tmp_path)
    shutil.rmtree(tmp_path / "ledger.db.deltas")
    (tmp_path / "ledger.db").unlink()
    with pytest.raises(LedgerError, match="The checkpoint knows 2 rows"):
        fit(quick_editor(EDITORS["ROME"]), requests, tmp_path, tmp_path / "last.ckpt")


def test_what_failed_is_a_row_that_says_why(tmp_path: Path) -> None:
    editor, [one, two] = quick_editor(EDITORS["ROME"]), tiny_requests(2)
    compute = editor.compute_edit

    def failing(batch: Any) -> Any:
        edit = compute(batch)
        edit.details["failed"] = {two.id: "It is so."}
        return edit

    editor.compute_edit = failing
    ledger = Ledger(tmp_path / "ledger.db")
    with ledger.recording(editor):
        editor.commit(editor.edit([one, two]))
    first, second = ledger.entries()
    assert first.requests == (one,)
    assert (second.kind, second.requests, second.why) == ("refused", (two,), "It is so.")
    assert second.before == second.after == first.after


class TakeBack(Callback):
    """Takes the second edit back at once."""

    def __init__(self) -> None:
        self.before: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.before = pl_module.delta

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            pl_module.edit_optimizer.rewind(self.before)


def test_an_undo_while_edits_are_recorded_is_one_row(tmp_path: Path) -> None:
    for name in ("ROME", "GRACE"):
        editor, requests = quick_editor(EDITORS[name]), tiny_requests(3)
        ledger = Ledger(tmp_path / f"{name}.db")
        with ledger.recording(editor) as recorder:
            for request in requests[:2]:
                editor.commit(editor.edit(request))
            ledger.undo(editor, 1)
            editor.commit(editor.edit(requests[2]))
        assert [entry.id for entry in recorder.entries] == [1, 2, 4]
        assert [entry.kind for entry in ledger.entries()] == ["edit", "edit", "undo", "edit"]
        assert [one.entry.id for one in ledger.standing(editor)] == [2, 4]


def test_what_was_taken_back_at_once_is_a_rollback(tmp_path: Path) -> None:
    editor, requests = quick_editor(EDITORS["ROME"]), tiny_requests(3)
    recorder = EditLedger(str(tmp_path / "ledger.db"))
    trainer = bare_trainer(max_epochs=1, callbacks=[TakeBack(), recorder])
    trainer.fit(editor, EditDataModule(requests=requests))
    ledger = Ledger(tmp_path / "ledger.db")
    assert [entry.kind for entry in ledger.entries()] == ["edit", "rollback", "edit"]
    assert [one.entry.id for one in ledger.standing(editor)] == [1, 3]
    assert not ledger.entry(2).delta


@pytest.mark.parametrize("kind", ["foreign", "editor"])
def test_what_lightnings_loop_trains_is_one_row(kind: str, tmp_path: Path) -> None:
    module: Any = foreign() if kind == "foreign" else quick_editor(FullTuning)
    model = module.net if kind == "foreign" else module.model
    before = fingerprint(model)
    recorder = EditLedger(str(tmp_path / "ledger.db"), why="new facts")
    trainer = bare_trainer(max_epochs=1, callbacks=[recorder, EditEvaluator()])
    trainer.fit(module, data_of())
    ledger = Ledger(tmp_path / "ledger.db")
    [entry] = ledger.entries()
    assert (entry.before, entry.after) == (before, fingerprint(model))
    assert entry.requests == tuple(tiny_requests(4))
    assert (entry.method, entry.why) == (type(module).__name__, "new facts")
    assert "reliability/teacher_forced" in entry.scores
    assert isinstance(ledger.edit(1), WeightDelta)
    ledger.undo(model)
    assert fingerprint(model) == before


def test_conflicts_are_found_before_a_weight_is_touched(tmp_path: Path) -> None:
    one, two, three = tiny_requests(3)
    contrary = replace(one, prompt=f" {one.prompt.upper()} ", subject=one.subject.upper(), id="new")
    contrary = replace(contrary, target_new=three.target_new, rephrases=())
    again = replace(two, prompt=two.prompt + " ", id="again")

    for policy in ("error", "skip", "replace"):
        folder = tmp_path / policy
        editor = quick_editor(EDITORS["ROME"])
        ledger = Ledger(folder / "ledger.db")
        with ledger.recording(editor):
            for request in (one, two):
                editor.commit(editor.edit(request))
        before = fingerprint(editor.model)
        if policy == "error":
            with pytest.raises(
                RequestError, match=r"'new'.*contradicts.*of row 1 .*'again'.*says the same"
            ):
                fit(editor, [contrary, again, three], folder)
            assert fingerprint(editor.model) == before
            assert len(ledger) == 2
            continue
        fit(editor, [contrary, again, three], folder, on_conflict=policy)
        rows = [(entry.kind, entry.request_ids, entry.undoes) for entry in ledger.entries()[2:]]
        left_out = ("refused", ("again",), ())
        if policy == "skip":
            assert rows[:2] == [("refused", ("new",), ()), left_out]
            assert rows[2:] == [("edit", (three.id,), ())]
        else:
            assert rows[:2] == [left_out, ("undo", (one.id,), (1,))]
            assert rows[2:] == [("edit", ("new",), ()), ("edit", (three.id,), ())]
            wanted = quick_editor(EDITORS["ROME"])
            for request in (two, contrary, three):
                wanted.commit(wanted.edit(request))
            assert fingerprint(editor.model) == fingerprint(wanted.model)
        assert ledger.verify() == []


def test_of_two_that_are_asked_for_together_one_is_made(tmp_path: Path) -> None:
    one, two = tiny_requests(2)
    contrary = replace(one, prompt=f"{one.prompt}:", target_new=two.target_new, id="new")
    for policy, left in (("skip", one.id), ("replace", "new")):
        editor = quick_editor(EDITORS["GRACE"])
        fit(editor, [one, contrary], tmp_path / policy, on_conflict=policy)
        assert list(editor.target.request_ids) == [left]
        kinds = [entry.kind for entry in Ledger(tmp_path / policy / "ledger.db").entries()]
        assert kinds == ["refused", "edit"]


def test_a_policy_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected `error`, `skip` or `replace`"):
        EditLedger(on_conflict="ignore")  # type: ignore[arg-type]
