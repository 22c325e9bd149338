# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A record of edits: who asked for what, which edit changed an answer, and the way back.

Run ``python examples/ledger.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightning_edit import ROME, Ledger
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.ledger.fingerprints import fingerprint
from lightning_edit.ledger.signing import new_key


def main(folder: Path) -> None:
    model, tokenizer = trained_tiny_model()
    unedited = fingerprint(model)
    public_key = new_key(folder / "key.pem")
    ledger = Ledger(folder / "ledger.db", who="anna", key=folder / "key.pem")
    editor = ROME.from_model(model, tokenizer, layers=[0], weight_decay=0.0, cache_dir=str(folder))
    requests = tiny_requests(2)
    with ledger.recording(editor, why="ticket 7"):
        for request in requests:
            editor.commit(editor.edit(request))
    for entry in ledger.entries():
        print(entry.id, entry.kind, *entry.request_ids, "by", entry.who, "for", entry.why)

    found = ledger.blame(editor, requests[0].prompt)
    print(f"{found.prompt} {found.answer} Because of edit {found.causes[0]}")

    [plan] = ledger.plan(editor, 1)
    print("cost:", plan)
    ledger.undo(editor, 1, why="it was wrong")
    for request in requests:
        print(request.prompt, *editor.evaluator.continuations([request.prompt]))

    ledger.undo(model, everything=True)
    print("every bit as before:", fingerprint(model) == unedited)
    print("rows:", len(ledger), "wrong:", ledger.verify(key=public_key))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
