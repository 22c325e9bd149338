# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Causal tracing of the default model: one whole forward pass a restoration, and ours.

    python benchmarks/causal_tracing.py              # one fact, a minute
    python benchmarks/causal_tracing.py --facts 4    # the first four demo facts, some minutes

The plain form runs the clean prompt and ten noisy copies through the whole model for each token,
each layer and each kind of state (hidden, MLP, attention), with hooks that put the clean states
back. Since all these passes are alike, some of them, spread over the prompt, are timed and their
time is multiplied. Ours is timed whole. Both take turns; figures are medians of CPU seconds on one
thread. The difference is the largest of the scores that both have computed.

How much is saved depends on the prompt: nothing before the subject is run, and after it only what
follows the restored token. So the ratio is larger the later the subject stands.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

SAMPLES, WINDOW, SEED = 10, 10, 0
KINDS = ("hidden", "mlp", "attention")


def plain_score(
    model: Any, ids: Sequence[int], subject: range, noise: Any, point: tuple[str, int, int]
) -> float:
    """Mean probability of the clean answer with one token's states put back."""
    import torch

    kind, token, layer = point
    blocks = model.model.layers
    reach = (layer, layer + 1)
    if kind != "hidden":
        reach = (max(0, layer - WINDOW // 2), min(len(blocks), layer + WINDOW // 2))
    parts = {"hidden": lambda b: b, "mlp": lambda b: b.mlp, "attention": lambda b: b.self_attn}

    def corrupt(_: Any, __: Any, output: Any) -> Any:
        output = output.clone()
        output[1:, subject.start : subject.stop] += noise
        return output

    def restore(_: Any, __: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[1:, token] = states[0, token]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    hooks = [model.get_input_embeddings().register_forward_hook(corrupt)]
    hooks += [parts[kind](b).register_forward_hook(restore) for b in blocks[slice(*reach)]]
    try:
        with torch.no_grad():
            rows = torch.tensor([list(ids)] * (1 + SAMPLES))
            last = model(input_ids=rows, use_cache=False).logits[:, -1].softmax(-1)
    finally:
        for hook in hooks:
            hook.remove()
    answer = int(last[0].argmax())
    return float(last[1:, answer].mean())


def measure(
    model: Any, tokens: Any, request: Any, deviation: float, runs: int, sampled: int
) -> dict[str, Any]:
    import torch

    from lightning_edit.tracing.causal_tracing import TracingSettings, trace_facts

    ids, subject = tokens.subject_range(request.prompt, request.subject)
    width = model.config.hidden_size
    generator = torch.Generator().manual_seed(SEED)
    normal = torch.randn(SAMPLES, len(subject), width, generator=generator)
    settings = TracingSettings(SAMPLES, 3.0, WINDOW, SEED)
    layers = len(model.model.layers)
    points = [(k, t, i) for t in range(len(ids)) for k in KINDS for i in range(layers)]
    plain, ours, difference = [], [], 0.0
    for run in range(runs):
        # Other points in each run, at equal distances.
        chosen = points[run :: max(1, len(points) // sampled)][:sampled]
        began = time.process_time()
        wanted = [plain_score(model, ids, subject, 3.0 * deviation * normal, p) for p in chosen]
        plain.append((time.process_time() - began) / len(chosen) * len(points))
        began = time.process_time()
        result = trace_facts(model, tokens, [request], settings, deviation=deviation, noise=normal)
        ours.append(time.process_time() - began)
        [fact] = result.facts
        for (kind, token, layer), score in zip(chosen, wanted, strict=True):
            found = float(fact.scores[kind][token, layer])  # type: ignore[index]
            difference = max(difference, abs(found - score))
    return {
        "prompt": request.prompt,
        "tokens": len(ids),
        "from_subject_on": len(ids) - subject.start,
        "plain_seconds": round(statistics.median(plain), 1),
        "our_seconds": round(statistics.median(ours), 2),
        "ratio": round(statistics.median(plain) / statistics.median(ours), 1),
        "difference": float(f"{difference:.1e}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=1, help="trace the first so many demo facts")
    parser.add_argument("--runs", type=int, default=3, help="turns of both forms")
    parser.add_argument("--sampled", type=int, default=15, help="plain passes timed in a turn")
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    from lightning_edit import Facts, PromptTokenizer, load_model, load_tokenizer
    from lightning_edit.core.locator import ModelTree
    from lightning_edit.tracing.causal_tracing import subject_deviation

    model, tokens = load_model("smollm2"), PromptTokenizer(load_tokenizer("smollm2"))
    requests = Facts(demo=True, limit=arguments.facts).requests
    subjects = [request.subject for request in requests]
    deviation = subject_deviation(ModelTree.of(model), tokens, subjects)
    rows = []
    for request in requests:
        rows.append(measure(model, tokens, request, deviation, arguments.runs, arguments.sampled))
        if len(rows) == 1:
            sys.stdout.write(" | ".join(rows[0]) + "\n")
        sys.stdout.write(" | ".join(str(value) for value in rows[-1].values()) + "\n")
        sys.stdout.flush()
    ratios = {row["prompt"]: row["ratio"] for row in rows}
    sys.stdout.write(json.dumps({"ratio": rows[0]["ratio"], "ratios": ratios}) + "\n")


if __name__ == "__main__":
    main()
