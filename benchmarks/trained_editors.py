# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Trained editors on held-out facts, an edit each, against fine-tuning and the unedited model.

    python benchmarks/trained_editors.py --data zsre_portability.json --facts 50 \
        mend=runs/mend.ckpt malmen=runs/malmen.ckpt

Teacher-forced metrics of zsRE; locality is agreement with the unedited model. `FT` are 15 steps of
Adam on one matrix (FT-M). A row with `@n` edits with n facts at once.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

METRICS = ("reliability", "generality", "locality", "portability")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("editors", nargs="*", help="NAME=CHECKPOINT, or NAME@N=CHECKPOINT")
    parser.add_argument("--data", required=True, help="a file of zsRE")
    parser.add_argument("--facts", type=int, default=50)
    parser.add_argument("--baselines", action="store_true", help="also FT and the unedited model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from lightning_edit import Evaluator, FineTune, PromptTokenizer, TrainedEditor, ZsRE
    from lightning_edit.models import load_model, load_tokenizer

    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    requests = ZsRE(path=arguments.data, limit=arguments.facts, skip_invalid=True).requests
    evaluator = Evaluator(model, PromptTokenizer(tokenizer), readings=["teacher_forced"])
    baselines = [evaluator.baseline([request]) for request in requests]
    rows: dict[str, dict[str, float]] = {}

    def measure(name: str, editor: Any, at_once: int = 1) -> None:
        scores: dict[str, list[float]] = {metric: [] for metric in METRICS}
        seconds = 0.0
        for start in range(0, len(requests), at_once):
            group = list(requests[start : start + at_once])
            began = time.perf_counter()
            edit = None if editor is None else editor.edit(group)
            seconds += time.perf_counter() - began
            if edit is not None:
                edit.apply_(model, check=False)
            for request, baseline in zip(group, baselines[start : start + at_once], strict=True):
                for probe in evaluator.evaluate([request], baseline).probes:
                    if probe.teacher_forced is not None:
                        scores[probe.metric].append(probe.teacher_forced)
            if edit is not None:
                edit.revert_(model)
        found = {metric: sum(s) / len(s) for metric, s in scores.items() if s}
        rows[name] = {**found, "seconds": seconds / len(requests)}
        shown = " | ".join(f"{found.get(metric, float('nan')):.3f}" for metric in METRICS)
        print(f"{name} | {shown} | {rows[name]['seconds']:.2f}", flush=True)

    print(f"editor | {' | '.join(METRICS)} | seconds a fact ({len(requests)} facts)")
    if arguments.baselines:
        measure("unedited", None)
        measure("FT", FineTune.from_model(model, tokenizer, preset="ft_m", steps=15))
    for item in arguments.editors:
        name, _, checkpoint = item.partition("=")
        at_once = int(name.partition("@")[2] or 1)
        editor = TrainedEditor.from_model(model, tokenizer, checkpoint=checkpoint)
        measure(name, editor, at_once)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
