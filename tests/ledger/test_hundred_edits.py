# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edit 37 of 100 is taken out, and the model is that of a run that never had it, bit for bit."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_edit import EditRequest, Ledger
from lightning_edit.demos import tiny_requests
from lightning_edit.ledger.fingerprints import fingerprint
from tests.contract.enumeration import EDITORS, RememberingEditor, quick_editor

pytest.importorskip("sqlalchemy")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*survives rounding:UserWarning"),
]

ANSWERS = [request.target_new for request in tiny_requests(10)]
PLACES = [a + b for a, b in product(("Vel", "Dor", "Ket", "Bru", "Ost"), "abcdefghijklmnopqrst")]
REQUESTS = [
    EditRequest("The capital of {} is", place, ANSWERS[i % 10], id=place)
    for i, place in enumerate(PLACES)
]
GONE = 37
#: Each method with the class that makes its edits.
METHODS: dict[str, Any] = {
    "MEND": EDITORS["TrainedEditor"],
    "SERAC": RememberingEditor,
    **{name: EDITORS[name] for name in ("ROME", "MEMIT", "AlphaEdit", "GRACE", "WISE")},
    **{name: EDITORS[name] for name in ("TPatcher", "IKE", "SCR")},
}


def edited(name: str, *without: int, ledger: Ledger | None = None) -> Any:
    """An editor that committed all requests but some, one after another."""
    editor = quick_editor(METHODS[name])
    for number, request in enumerate(REQUESTS, 1):
        if number in without:
            continue
        edit = editor.edit(request)
        if ledger is None:
            editor.commit(edit)
            continue
        with ledger.recording(editor):
            editor.commit(edit)
    return editor


@pytest.mark.parametrize("name", METHODS)
def test_edit_37_of_100_was_never_there(name: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    editor = edited(name, ledger=ledger)
    assert len(ledger) == 100
    [plan] = ledger.plan(editor, GONE)  # its cost is told before
    assert (plan.how, plan.again, plan.requests) == ("made again", 99, (REQUESTS[GONE - 1].id,))
    [row] = ledger.undo(editor, GONE)
    assert row.undoes == (GONE,)
    assert ledger.verify() == []
    wanted = edited(name, GONE)
    assert editor.target.request_ids == wanted.target.request_ids
    assert row.after == fingerprint(editor.model) == fingerprint(wanted.model)
    prompts = [request.prompt for request in REQUESTS]
    texts = [one.evaluator.continuations(prompts) for one in (editor, wanted)]
    assert texts[0] == texts[1]
    ids = editor.evaluator.tokens.tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = [one.model(**ids).logits for one in (editor, wanted)]
    assert torch.equal(*logits)
