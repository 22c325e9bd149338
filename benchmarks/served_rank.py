# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Fifty MEMIT edits as one LoRA adapter: how many hold when it is cut to a rank.

    python benchmarks/served_rank.py

The packaged facts that the default model knows are edited in one batch. An edit holds if the
likeliest answer is the new one, token by token, with the factors of the adapter in the weights.
"""

from __future__ import annotations

import argparse

import torch

from lightning_edit import MEMIT, Evaluator, Facts, WeightDelta, load_model, load_tokenizer
from lightning_edit.core.change import LowRank
from lightning_edit.core.lora import left_out

RANKS = (1, 2, 4, 8, 16, 32, None)


def main(count: int, steps: int) -> None:
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    requests = Facts().requests[:count]
    editor = MEMIT.from_model(model, tokenizer, preset="smollm2", steps=steps)
    edit = editor.edit(requests)
    evaluator = Evaluator(model, editor.tokens, readings=["teacher_forced"])
    print(f"{len(requests)} edits of {len(edit.changes)} matrices")
    print("| rank | left out of ‖Δ‖ | edits that hold |\n|--:|--:|--:|")
    for rank in RANKS:
        factors = edit.to_lora(model, rank)
        changes = {f"{name}.weight": LowRank(one.b, one.a.T) for name, one in factors.items()}
        with WeightDelta(changes).applied(model), torch.no_grad():
            scored = evaluator.evaluate(requests)
        held = [one.exact for one in scored.probes if one.metric == "reliability"]
        name = rank or max(one.rank for one in factors.values())
        missing = left_out(factors, edit.norms())
        print(f"| {name} | {missing:.2g} | {sum(map(bool, held))} of {len(held)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    main(arguments.count, arguments.steps)
