# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""How many tokens a second moment needs: MEMIT with few of them against MEMIT with many.

    python benchmarks/second_moments.py --text some.txt

The ten demo facts are written into the default model in one batch, with the same target values and
with second moments from more and more tokens: of the text, or of what the model writes without one.
The token budget is a multiple of the keys' dimensions, as arXiv 2506.04226 has it. Shown are the
difference of the update from that with the most tokens and what becomes of the facts,
teacher-forced (all tokens of an answer right).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

import lightning_edit as le
from lightning_edit.core.batch import EditBatch
from lightning_edit.evaluation.evaluator import Evaluator

LAYERS = [4, 5, 6, 7, 8]
METRICS = ("reliability", "generality", "locality")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", help="a text file; the model's own samples without it")
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--moment_weight", type=float, help="chosen by the written share if None")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = le.load_model("smollm2"), le.load_tokenizer("smollm2")
    requests = le.Facts(demo=True).requests

    def editor_of(multiple: int) -> Any:
        return le.MEMIT.from_model(
            model,
            tokenizer,
            preset="smollm2",
            layers=LAYERS,
            steps=20,  # as in the figures of docs/editing.md
            moment_weight=options.moment_weight,
            second_moment_text=options.text,
            tokens_per_dimension=multiple,
        )

    first = editor_of(1)
    batch = EditBatch.from_requests(requests, first.tokens)
    with torch.enable_grad():
        values = first.target_values(batch, LAYERS[-1])
    evaluator = Evaluator(model, first.tokens, readings=["teacher_forced"])
    baseline = evaluator.baseline(requests)
    rows: list[dict[str, Any]] = []
    edits = []
    for multiple in options.multiples:
        editor = editor_of(multiple)
        editor.target_values = lambda *_: values
        began = time.process_time()
        for layer in LAYERS:
            editor.second_moment(layer)
        seconds = time.process_time() - began
        edit = editor.edit(requests)
        edits.append(edit)
        with edit.applied(model):
            probes = evaluator.evaluate(requests, baseline).probes
        row: dict[str, Any] = {"multiple": multiple, "seconds": round(seconds, 1)}
        for metric in METRICS:
            hits = [p.exact for p in probes if p.metric == metric and p.exact is not None]
            row[metric] = round(sum(hits) / len(hits), 3)
        rows.append(row)
    for row, edit in zip(rows, edits, strict=True):
        row["difference"] = round((edit - edits[-1]).norm() / edits[-1].norm(), 3)
    out = ["tokens / dimension | CPU s | difference | " + " | ".join(METRICS)]
    out += [
        f"{row['multiple']} | {row['seconds']} | {row['difference']} | "
        + " | ".join(str(row[metric]) for metric in METRICS)
        for row in rows
    ]
    sys.stdout.write("\n".join([*out, json.dumps({"rows": rows})]) + "\n")


if __name__ == "__main__":
    main()
