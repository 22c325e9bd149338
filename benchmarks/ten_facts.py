# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors on the ten demo facts, each by itself: CPU seconds an edit, peak memory, strict match.

    python benchmarks/ten_facts.py                    # all editors, one process each
    python benchmarks/ten_facts.py --editor rome      # one of them

Every fact is edited alone, from the unedited model, and measured on its prompt, its paraphrases
and its neighbors; a match is strict when all tokens of the answer are right. With ``_bf16``, target
values are found in bfloat16, as under a Trainer of ``precision="bf16-mixed"``, which pays where the
processor has bfloat16 products (AMX or AVX512-bf16).

The peak is that of loading, statistics, contexts and edits; measuring comes after it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

# Presets of the default model; `EDITORS` has some of them in bfloat16 as well.
PRESETS = {
    "ft_m": ("FineTune", "ft_m"),
    "lora": ("LoRA", "smollm2"),
    "rome": ("ROME", "smollm2"),
    "r_rome": ("RROME", "smollm2"),
    "memit": ("MEMIT", "smollm2"),
    "emmet": ("EMMET", "smollm2"),
    "alpha_edit": ("AlphaEdit", "smollm2"),
    "kn": ("KN", "smollm2"),
    "ultra_edit": ("UltraEdit", "smollm2"),
    "grace": ("GRACE", "smollm2"),
    "wise": ("WISE", "smollm2"),
    "t_patcher": ("TPatcher", "smollm2"),
    "calinet": ("CaliNET", "smollm2"),
    "scr": ("SCR", "smollm2"),
}
EDITORS = (*PRESETS, "rome_bf16", "memit_bf16", "alpha_edit_bf16")


def build(name: str, model: Any, tokenizer: Any) -> Any:
    import lightning_edit as le

    method, preset = PRESETS[name.removesuffix("_bf16")]
    return getattr(le, method).from_model(model, tokenizer, preset=preset)


def measure(name: str) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    from lightning_edit import Evaluator, Facts, load_model, load_tokenizer

    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    requests = Facts(demo=True).requests
    editor = build(name, model, tokenizer)
    evaluator = Evaluator(model, editor.tokens, readings=["teacher_forced"])
    if hasattr(editor, "second_moment"):
        for site in editor.sites(editor.tree):
            editor.second_moment(site.layer)
        _ = editor.templates
    bf16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=name.endswith("bf16"))
    seconds, edits = [], []
    with bf16:
        editor.edit(requests[:1])  # warms allocators and kernels up
        for request in requests:
            began = time.process_time()
            edits.append(editor.edit(request))
            seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    steps = [row.get("steps", 1) for edit in edits for row in edit.details["requests"]]

    hits: dict[str, list[bool]] = {"reliability": [], "generality": [], "locality": []}
    for request, edit in zip(requests, edits, strict=True):
        baseline = evaluator.baseline([request])
        with edit.applied(model):
            scored = evaluator.evaluate([request], baseline)
        for probe in scored.probes:
            neighbor = probe.metric != "locality" or probe.kind == "neighborhood"
            if probe.metric in hits and probe.exact is not None and neighbor:
                hits[probe.metric].append(probe.exact)
    # Four probes a record, as the peer measures, and all that there are.
    few = [
        replace(r, rephrases=r.rephrases[:1], locality=r.locality[:2], portability=())
        for r in requests
    ]
    return {
        "editor": name,
        "edit_cpu_seconds": round(statistics.median(seconds), 2),
        "steps": sum(steps) / len(steps),
        "evaluate_4_probes_cpu_seconds": round(evaluate_seconds(evaluator, few), 3),
        "evaluate_all_probes_cpu_seconds": round(evaluate_seconds(evaluator, requests), 3),
        "peak_gigabytes": round(peak, 2),
        **{name: round(sum(found) / len(found), 2) for name, found in hits.items()},
    }


def evaluate_seconds(evaluator: Any, requests: list[Any]) -> float:
    """CPU seconds a record, teacher-forced, all records at once."""
    baseline = evaluator.baseline(requests)
    seconds = []
    for _ in range(3):
        began = time.process_time()
        evaluator.evaluate(requests, baseline)
        seconds.append((time.process_time() - began) / len(requests))
    return statistics.median(seconds)


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
