# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""An edit as a file: made, saved, served by peft as a LoRA adapter, and undone bit for bit.

Run ``python examples/save_export_undo.py``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from lightning_edit import ROME, WeightDelta, load_model
from lightning_edit.artifacts import export
from lightning_edit.core.hashing import weight_hash
from lightning_edit.demos import tiny_requests, trained_tiny_model

request = tiny_requests(2)[1]


def say(model: Any, tokenizer: Any) -> str:
    tokens = tokenizer(request.prompt, return_tensors="pt")
    written = model.generate(**tokens, max_new_tokens=5, do_sample=False)[0]
    return str(tokenizer.decode(written, skip_special_tokens=True))


def main(folder: Path) -> None:
    model, tokenizer = trained_tiny_model()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base_hash = weight_hash(model)
    print("base   ", say(model, tokenizer))

    editor = ROME.from_model(model, tokenizer, layers=[0], weight_decay=0.0, cache_dir=str(folder))
    editor.edit(request).save(folder / "delta")
    delta = WeightDelta.load(folder / "delta")
    delta.apply_(model)
    print("edited ", say(model, tokenizer))

    written = export(str(folder / "delta"), model=str(folder / "base"), output=str(folder / "lora"))
    adapted: Any = PeftModel.from_pretrained(load_model(str(folder / "base")), str(written.folder))
    print("by peft", say(adapted, tokenizer))
    tokens = tokenizer(request.prompt, return_tensors="pt")
    with torch.no_grad():
        off = float((adapted(**tokens).logits - model(**tokens).logits).abs().max())
    print(f"largest difference of their logits: {off:.1e}")

    delta.revert_(model)
    print("undone ", say(model, tokenizer))
    print("every bit as before:", weight_hash(model) == base_hash)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
