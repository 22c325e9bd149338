# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Fifty MEMIT edits as one LoRA adapter: how many hold when it is cut to a rank.

    python benchmarks/served_rank.py                  # the tiny model, seconds
    python benchmarks/served_rank.py --model smollm2  # the default model, minutes

They are made in one batch: of the packaged facts that the default model knows, or for the tiny
model of made-up places. An edit holds if the likeliest answer is the new one, token by token, with
the factors of the adapter in the weights.
"""

from __future__ import annotations

import argparse

import torch

from lightning_edit import (
    MEMIT,
    EditRequest,
    Evaluator,
    Facts,
    WeightDelta,
    load_model,
    load_tokenizer,
)
from lightning_edit.core.change import LowRank
from lightning_edit.core.lora import left_out
from lightning_edit.demos import tiny_requests, trained_tiny_model

RANKS = (1, 2, 4, 8, 16, 32, 64)


def made_up(count: int) -> list[EditRequest]:
    """Capitals of places that the tiny model has never read of."""
    answers = [request.target_new for request in tiny_requests(24)]
    places = [f"{a}{b}" for b in "abcdefghijklmnop" for a in ("Vel", "Dor", "Ket", "Bru")]
    return [
        EditRequest("The capital of {} is", place, answers[i % len(answers)])
        for i, place in enumerate(places[:count])
    ]


def main(name: str, count: int, steps: int) -> None:
    if name == "tiny":
        model, tokenizer = trained_tiny_model()
        requests = made_up(count)
        editor = MEMIT.from_model(model, tokenizer, layers=[0, 1, 2], steps=steps)
    else:
        model, tokenizer = load_model(name), load_tokenizer(name)
        requests = list(Facts().requests[:count])
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
        most = max(one.rank for one in factors.values())
        missing = left_out(factors, edit.norms())
        print(f"| {most} | {missing:.2g} | {sum(map(bool, held))} of {len(held)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    main(arguments.model, arguments.count, arguments.steps)
