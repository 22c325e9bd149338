# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors on the ten demo facts, each by itself: CPU seconds an edit, peak memory, strict match.

    python benchmarks/ten_facts.py                    # all editors, one process each
    python benchmarks/ten_facts.py --editor rome      # one of them

Every fact is edited alone, from the unedited model, and measured on its prompt, its paraphrases
and its neighbors; a match is strict when all tokens of the answer are right.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

EDITORS = ("ft_m", "lora", "rome")


def build(name: str, model: Any, tokenizer: Any) -> Any:
    from lightning_edit import ROME, FineTune, LoRA

    if name == "rome":
        # 25 passes and 21 contexts, as the peer's configuration has them.
        return ROME.from_model(
            model, tokenizer, layers=[5], steps=25, weight_decay=1e-3, clamp_norm_factor=1.5
        )
    if name == "lora":
        return LoRA.from_model(model, tokenizer, steps=70)
    return FineTune.from_model(
        model, tokenizer, layers=[21], objective="target_new", steps=25, norm_constraint=None
    )


def measure(name: str) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    from lightning_edit import Evaluator, Facts, load_model, load_tokenizer

    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    requests = Facts(demo=True).requests
    editor = build(name, model, tokenizer)
    evaluator = Evaluator(model, editor.tokens, readings=["teacher_forced"])
    if name == "rome":
        editor.second_moment(5)
        _ = editor.templates
    editor.edit(requests[:1])  # warms allocators and kernels up
    hits: dict[str, list[bool]] = {"reliability": [], "generality": [], "locality": []}
    edit_seconds, evaluate_seconds, steps = [], [], []
    for request in requests:
        baseline = evaluator.baseline([request])
        began = time.process_time()
        edit = editor.edit(request)
        edit_seconds.append(time.process_time() - began)
        steps += [row["steps"] for row in edit.details["requests"]]
        with edit.applied(model):
            scored = evaluator.evaluate([request], baseline)
        for probe in scored.probes:
            neighbor = probe.metric != "locality" or probe.kind == "neighborhood"
            if probe.metric in hits and probe.exact is not None and neighbor:
                hits[probe.metric].append(probe.exact)
    baseline = evaluator.baseline(requests)
    for _ in range(3):
        began = time.process_time()
        evaluator.evaluate(requests, baseline)
        evaluate_seconds.append((time.process_time() - began) / len(requests))
    return {
        "editor": name,
        "edit_cpu_seconds": round(sorted(edit_seconds)[len(edit_seconds) // 2], 2),
        "steps": sum(steps) / len(steps),
        "evaluate_cpu_seconds_a_record": round(sorted(evaluate_seconds)[1], 3),
        "probes_a_record": round(len(scored.probes), 1),
        "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        **{name: round(sum(found) / len(found), 2) for name, found in hits.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--editor", choices=EDITORS, help="measure this one in this process")
    chosen = parser.parse_args().editor
    if chosen:
        sys.stdout.write(json.dumps(measure(chosen)) + "\n")
        return
    rows = []
    for name in EDITORS:
        command = [sys.executable, __file__, "--editor", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.strip().splitlines()[-1]))
        columns = rows[0].keys()
        if len(rows) == 1:
            sys.stdout.write(" | ".join(columns) + "\n")
        sys.stdout.write(" | ".join(str(rows[-1][column]) for column in columns) + "\n")
    sys.stdout.write(json.dumps({row["editor"]: row for row in rows}) + "\n")


if __name__ == "__main__":
    main()
