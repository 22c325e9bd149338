# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits are taken out by the number of their row: the last bit for bit, any other by replay."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_edit import ROME, Ledger, MemoryWrite
from lightning_edit.core.errors import LedgerError
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.ledger.fingerprints import fingerprint
from tests.contract.enumeration import EDITORS, quick_editor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*survives rounding:UserWarning"),
]

REQUESTS = tiny_requests(4)


# AlphaEdit carries something from edit to edit; WISE edits a memory of matrices.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("AlphaEdit", "WISE")]


@pytest.fixture(params=["ROME", "LoRA", "GRACE", *SLOW], scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def edited(name: str, *numbers: int, ledger: Ledger | None = None) -> Any:
    """An editor that committed requests, one after another."""
    editor = quick_editor(EDITORS[name])
    for number in numbers:
        if ledger is None:
            editor.commit(editor.edit(REQUESTS[number]))
            continue
        with ledger.recording(editor):
            editor.commit(editor.edit(REQUESTS[number]))
    return editor


def test_what_was_committed_comes_out_again(name: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    editor = edited(name, 0, 1, 2, ledger=ledger)
    model, first = editor.model, ledger.entry(1)
    assert [e.request_ids for e in ledger.entries()] == [(r.id,) for r in REQUESTS[:3]]
    kept, plain = copy.deepcopy(model), copy.deepcopy(model)
    assert fingerprint(kept) == fingerprint(model)
    is_memory = isinstance(ledger.edit(1), MemoryWrite)

    # The last one, of an editor, which goes on as if it had never been.
    [plan] = ledger.plan(editor)
    assert (plan.entry, plan.requests) == (3, (REQUESTS[2].id,))
    [row] = ledger.undo(editor, why="wrong")
    assert (row.kind, row.undoes, row.why) == ("undo", (3,), "wrong")
    assert row.requests == (REQUESTS[2],)
    assert row.after == fingerprint(model) == ledger.entry(2).after
    assert [r["id"] for r in editor.history] == [r.id for r in REQUESTS[:2]]
    wanted = edited(name, 0, 1)
    assert fingerprint(model) == fingerprint(wanted.model)
    for one in (editor, wanted):
        one.commit(one.edit(REQUESTS[3]))
    assert fingerprint(model) == fingerprint(wanted.model)

    # All of them, of a model alone, which is then its base, bit for bit.
    before = len(ledger)
    rows = ledger.undo(plain, everything=True)
    assert [r.undoes for r in rows] == [(3,), (2,), (1,)]
    assert {p.how for p in ledger.plan(kept, everything=True)} == {"reverted"}
    assert fingerprint(plain) == first.before
    assert len(ledger) == before + 2  # one of them was there
    assert ledger.standing(plain) == ()
    with pytest.raises(LedgerError, match="knows no edit in this model"):
        ledger.undo(plain)

    # One in the middle, of a model alone: original + the others, or what the memory has left.
    assert [p.how for p in ledger.plan(kept, 2)] == ["forgotten" if is_memory else "added up"]
    [row] = ledger.undo(kept, 2)
    assert [one.entry.id for one in ledger.standing(kept)] == [1, 3]
    ledger.edit(row.id).revert_(kept)
    assert fingerprint(kept) == row.before
    ledger.edit(row.id)
    [again] = ledger.undo(kept, 2)
    assert again == row
    ledger.undo(kept, to=1)
    assert [one.entry.id for one in ledger.standing(kept)] == [1]
    assert ledger.verify() == []


def test_one_in_the_middle_is_as_if_it_had_never_been(name: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    editor = edited(name, 0, 1, 2, ledger=ledger)
    copied = copy.deepcopy(editor.model)
    known = {k: v for k, v in editor.hparams.items() if k in ("cache_dir",)}
    resumed = ledger.editor(copied, tiny_tokenizer(), **known)
    wanted = edited(name, 0, 2)
    for one in (editor, resumed):
        [plan] = ledger.plan(one, 2)
        [row] = ledger.undo(one, 2)
        assert row.undoes == (2,)
        assert (plan.how, plan.again) == ("made again", 2)
        assert plan.tensors
        assert plan.nbytes
        assert row.after == fingerprint(one.model) == fingerprint(wanted.model)
        assert list(one.target.request_ids) == [REQUESTS[0].id, REQUESTS[2].id]
    assert [e.kind for e in ledger.entries()].count("undo") == 1  # both led to the same
    assert ledger.verify() == []


def test_of_two_edits_of_one_request_the_first_is_made_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    editor = edited("GRACE", 0, 1, ledger=ledger)
    with ledger.recording(editor):
        editor.commit(editor.edit(replace(REQUESTS[0], target_new=REQUESTS[2].target_new)))
    assert len(editor.memory) == 2
    ledger.undo(editor)
    assert editor.edit_optimizer.requests[REQUESTS[0].id] == REQUESTS[0]
    ledger.undo(editor, 2)
    assert fingerprint(editor.model) == fingerprint(edited("GRACE", 0).model)


def test_what_cannot_be_recorded_is_not_taken_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    editor = edited(name, 0, 1, ledger=ledger)
    before, history = fingerprint(editor.model), editor.history

    def refuse(*_: object) -> None:
        raise LedgerError("The disk is full.")

    for target in (copy.deepcopy(editor.model), editor):
        for number in (1, 2):
            with monkeypatch.context() as patch:
                patch.setattr(Ledger, "append", refuse)
                with pytest.raises(LedgerError, match="The disk is full"):
                    ledger.undo(target, number)
            assert fingerprint(editor.model if target is editor else target) == before
    assert (editor.history, len(ledger)) == (history, 2)
    ledger.undo(editor, 2)  # and the editor goes on
    editor.commit(editor.edit(REQUESTS[2]))
    wanted = edited(name, 0, 2)
    assert tuple(editor.target.request_ids) == tuple(wanted.target.request_ids)
    assert fingerprint(editor.model) == fingerprint(wanted.model)


def test_what_is_not_there_is_not_taken_out(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    editor = edited("ROME", 0, 1, ledger=ledger)
    ledger.note("refused", [REQUESTS[2]], editor)
    ledger.undo(editor, 1)
    before = fingerprint(editor.model)
    asked: list[tuple[dict[str, Any], str]] = [
        (
            {"number": 1},
            r"Row 1 \(edit\) is no edit that is in this model\. Row 4 took it out\. In it: 2\.",
        ),
        ({"number": 3}, r"Row 3 \(refused\)"),
        ({"number": 9}, "has no row 9"),
        ({"number": 2, "everything": True}, "Name one edit, or"),
    ]
    for arguments, said in asked:
        with pytest.raises(LedgerError, match=said):
            ledger.undo(editor, **arguments)
    with torch.no_grad():
        editor.model.get_parameter(editor.edited_names(editor.tree)[0])[0, 0] += 1
    with pytest.raises(LedgerError, match="something else was changed in it since"):
        ledger.undo(editor, 2)
    assert fingerprint(editor.model) != before


def test_without_originals_nothing_is_guessed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db", originals=False)
    model = edited("ROME", 0, 1, ledger=ledger).model
    before = fingerprint(model)
    for number in (1, 2):
        with pytest.raises(LedgerError, match="saved without what its edit replaced"):
            ledger.undo(model, number)
    assert fingerprint(model) == before


def test_blame_names_the_edit_that_changed_an_answer(tmp_path: Path) -> None:
    for name in ("ROME", "GRACE"):
        ledger = Ledger(tmp_path / f"{name}.db")
        editor = quick_editor(EDITORS[name])
        if name == "ROME":
            editor = ROME.from_model(
                *trained_tiny_model(), layers=[0], weight_decay=0.0, cache_dir=str(tmp_path)
            )
        with ledger.recording(editor):
            for request in REQUESTS[:2]:
                editor.commit(editor.edit(request))
        before = fingerprint(editor.model)
        found = ledger.blame(editor, REQUESTS[0].prompt)
        assert fingerprint(editor.model) == before
        assert found.answer == f"{REQUESTS[0].target_new}."
        rows = {row.entry.id: row for row in found.rows}
        assert rows.keys() == {1, 2}
        assert 1 in found.causes
        assert rows[1].says == f"{REQUESTS[0].target_old}."
        asked = ledger.blame(editor.model, found.prompt, editor.tokens, answer=found.answer)
        assert asked == found
        # Taken out for good, an edit leaves what was measured without it.
        ledger.undo(editor, 2)
        left = ledger.blame(editor, found.prompt, answer=found.answer)
        assert left.p == pytest.approx(rows[2].p_without, rel=1e-3)
    with pytest.raises(LedgerError, match="knows no edit"):
        ledger.blame(tiny_model(), "Who", tiny_tokenizer())
