# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits of ten known facts, and what quantising the edited model makes of each.

    python benchmarks/survival.py                 # all editors, one process each
    python benchmarks/survival.py --editor rome   # one of them
    python benchmarks/survival.py --formats q4_0  # in another format

Every fact is edited alone, from the unedited model, which is then rounded as each format stores it.
Needs torchao (`pip install 'lightning-edit[quantise]'`) and gguf.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from typing import Any, get_args

from lightning_edit.evaluation.quantised import QuantFormat

EDITORS = {
    "rome": ("ROME", "smollm2"),
    "memit": ("MEMIT", "smollm2"),
    "alpha_edit": ("AlphaEdit", "smollm2"),
    "ft_l": ("FineTune", "ft_l"),
    "lora": ("LoRA", "smollm2"),
}


def measure(name: str, forms: list[QuantFormat]) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(1)
    import lightning_edit as le
    from lightning_edit.evaluation.survival import measure_survival

    model, tokenizer = le.load_model("smollm2"), le.load_tokenizer("smollm2")
    method, preset = EDITORS[name]
    editor = getattr(le, method).from_model(model, tokenizer, preset=preset)
    rows = []
    for request in le.Facts(demo=True).requests:
        with editor.edit(request).applied(model):
            rows += measure_survival(model, editor.tokens, [request], forms)
    table = []
    for form in forms:
        own = [row for row in rows if row.form == form]
        outcomes = [row.outcome for row in own]
        nats = [math.log(row.before) - math.log(row.after) for row in own if row.took]
        table.append(
            {
                "editor": name,
                "format": form,
                "took": sum(row.took for row in own),
                "held": outcomes.count("held"),
                "lost": outcomes.count("lost"),
                "p_before": round(statistics.fmean(row.before for row in own), 3),
                "p_after": round(statistics.fmean(row.after for row in own), 3),
                "median_nats_lost": round(statistics.median(nats), 3) if nats else None,
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--editor", choices=EDITORS, help="measure this one in this process")
    parser.add_argument(
        "--formats", nargs="+", choices=get_args(QuantFormat), default=["int8", "int4"]
    )
    given = parser.parse_args()
    chosen = given.editor
    for name in [chosen] if chosen else EDITORS:
        if chosen:
            rows = measure(name, given.formats)
        else:
            command = [sys.executable, __file__, "--editor", name, "--formats", *given.formats]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        for row in rows:
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
