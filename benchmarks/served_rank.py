# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Fifty MEMIT edits as one LoRA adapter: how many hold when it is cut to a rank.

    python benchmarks/served_rank.py

The packaged facts that the default model knows are edited in one batch, which is kept in
``--folder``. Each adapter is written as it is served, and peft alone puts it on the base model. An
edit holds if the likeliest answer is the new one, token by token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from lightning_edit import MEMIT, Evaluator, Facts, WeightDelta, load_model, load_tokenizer
from lightning_edit.artifacts.adapters import save_adapter
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.lora import left_out
from lightning_edit.core.request import EditRequest

RANKS = (1, 2, 4, 8, 16, 32)


def main(count: int, steps: int, ranks: list[int], folder: Path) -> None:
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    tokens = PromptTokenizer(tokenizer)
    data = Facts(limit=count)
    data.setup("fit")
    requests = data.requests
    if not (folder / "delta").exists():
        editor = MEMIT.from_model(model, tokenizer, preset="smollm2", steps=steps)
        editor.edit(requests).save(folder / "delta")
    edit = WeightDelta.load(folder / "delta")
    with edit.applied(model):
        wanted, known = logits(model, tokens, requests), held(model, tokens, requests)
    print(f"{len(requests)} edits of {len(edit.changes)} matrices: {known} hold in the weights")
    print("| rank | left out of ‖Δ‖ | largest difference of a logit | edits that hold |")
    print("|--:|--:|--:|--:|")
    for rank in (*ranks, None):
        factors = edit.to_lora(model, rank)
        save_adapter(factors, folder / f"rank_{rank or 'full'}", provenance=edit.provenance)
        adapted = PeftModel.from_pretrained(model, str(folder / f"rank_{rank or 'full'}"))
        apart = (logits(adapted, tokens, requests) - wanted).abs().max()
        kept = held(model, tokens, requests)
        model = adapted.unload()
        name = rank or max(one.rank for one in factors.values())
        missing = left_out(factors, edit.norms())
        print(f"| {name} | {missing:.2g} | {apart:.2g} | {kept} of {count} |", flush=True)


@torch.no_grad()
def logits(model: nn.Module, tokens: PromptTokenizer, requests: list[EditRequest]) -> Tensor:
    """Logits after each prompt, of shape (requests, vocabulary)."""
    rows = [tokens.tokenizer(one.prompt, return_tensors="pt") for one in requests]
    return torch.stack([model(**row).logits[0, -1] for row in rows])


def held(model: nn.Module, tokens: PromptTokenizer, requests: list[EditRequest]) -> int:
    """How many requests are answered with their new answer."""
    evaluator = Evaluator(model, tokens, readings=["teacher_forced"])
    probes = evaluator.evaluate([request.fact() for request in requests]).probes
    return sum(bool(one.exact) for one in probes if one.metric == "reliability")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--folder", type=Path, default=Path("runs/served_rank"))
    arguments = parser.parse_args()
    main(arguments.count, arguments.steps, arguments.ranks, arguments.folder)
