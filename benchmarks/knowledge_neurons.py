# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Attribution of all MLP neurons to an answer: the plain form and ours, CPU seconds a prompt.

    python benchmarks/knowledge_neurons.py                 # three demo facts, twice each
    python benchmarks/knowledge_neurons.py --facts 1 --rounds 1

The plain form takes one layer at a time: all points of the integral as one batch of whole rows
through the whole model, a hook in the layer, and one gradient. Both sides attribute the same
answers with the same points, alternately, in one thread, and must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

POINTS = 20


def plain(model: Any, projections: list[Any], ids: list[int], token: int) -> Tensor:
    """Attributions [L, M], layer by layer, with whole rows through the whole model."""
    row = torch.tensor([ids])
    activations: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor]) -> None:
        activations.append(args[0][0, -1].clone())

    hooks = [projection.register_forward_pre_hook(keep) for projection in projections]
    with torch.no_grad():
        model(input_ids=row, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = []
    for projection, activation in zip(projections, activations, strict=True):
        points = torch.linspace(0, 1, POINTS)[:, None]
        scaled = (points * activation).requires_grad_()

        def put(_: Any, args: tuple[Tensor], scaled: Tensor = scaled) -> tuple[Tensor]:
            return (torch.cat([args[0][:, :-1], scaled[:, None]], 1),)

        hook = projection.register_forward_pre_hook(put)
        logits = model(input_ids=row.expand(POINTS, -1), use_cache=False).logits
        hook.remove()
        probability = torch.softmax(logits[:, -1], -1)[:, token]
        [gradient] = torch.autograd.grad(probability.sum(), scaled)
        found.append(activation * gradient.mean(0))
    return torch.stack(found)


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = time.process_time()
    found = run()
    return time.process_time() - began, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from lightning_edit import KN, Facts, load_model, load_tokenizer

    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    editor = KN.from_model(model, tokenizer, preset="smollm2", steps=POINTS)
    tree = editor.tree
    model.requires_grad_(False)
    projections = [tree.mlp_out(i).module(model) for i in range(len(tree.blocks))]
    requests = Facts(demo=True, limit=arguments.facts).requests
    editor.find(requests[0])  # warms allocators and kernels up

    print("prompt | tokens | plain | ours | ratio | relative difference")
    ratios, times = [], []
    for request in requests:
        ids = editor.tokens.prompt(request.prompt)
        token = editor.tokens.target(request.prompt, request.target_old or "")[0]
        answer = tokenizer.decode([token])
        one = request.__class__(request.prompt, request.subject, request.target_new, answer)
        seconds: dict[str, list[float]] = {"plain": [], "ours": []}
        difference = 0.0
        for _ in range(arguments.rounds):
            spent, wanted = timed(lambda: plain(model, projections, ids, token))  # noqa: B023
            seconds["plain"].append(spent)
            spent, found = timed(lambda: editor.find(one).attributions[0])  # noqa: B023
            seconds["ours"].append(spent)
            difference = max(difference, float((found - wanted).norm() / wanted.norm()))
        a, b = (statistics.median(seconds[name]) for name in ("plain", "ours"))
        ratios.append(a / b)
        times.append((a, b))
        print(f"{request.prompt} | {len(ids)} | {a:.2f} | {b:.2f} | {a / b:.1f} | {difference:.1e}")
        if difference > 1e-3:
            raise SystemExit("The two sides disagree.")
    print(
        json.dumps(
            {
                "ratio": round(statistics.median(ratios), 2),
                "plain_cpu_seconds": round(statistics.median(a for a, _ in times), 3),
                "ours_cpu_seconds": round(statistics.median(b for _, b in times), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
