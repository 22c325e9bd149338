# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits beside the weights: made by GRACE, listed, kept in a file, and taken out one by one.

Run ``python examples/remember_and_forget.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_edit import GRACE, EditDataModule, EditMemory, MemoryWrite
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.hashing import weight_hash
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.evaluation.scoring import continuations

requests = tiny_requests(3)
prompts = [request.prompt for request in requests]


def main(folder: Path) -> None:
    model, tokenizer = trained_tiny_model()
    base_hash = weight_hash(model)
    editor = GRACE.from_model(model, tokenizer, layers=[2], radius=0.1)
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(editor, EditDataModule(requests=requests))
    for request_id, kept in editor.memory.requests.items():
        print(f"{request_id}: {kept['prompt']} → {kept['target']}")
    editor.committed().save(folder / "memory")

    served, _ = trained_tiny_model()
    tokens = PromptTokenizer(tokenizer)
    before = continuations(served, tokens, prompts)
    MemoryWrite.load(folder / "memory").apply_(served)
    print("remembered:", [said.text for said in continuations(served, tokens, prompts)])
    MemoryWrite.removing(served, [requests[1].id]).apply_(served)
    print("without", requests[1].id, [s.text for s in continuations(served, tokens, prompts)])
    memory = EditMemory.find(served)
    if memory is not None:
        MemoryWrite.removing(served, list(memory.requests)).apply_(served)
    print("as before:", continuations(served, tokens, prompts) == before)
    print("weights untouched:", weight_hash(served) == base_hash)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
