# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What `plan` computes beside what edits take: operations, seconds and memory.

    python benchmarks/plan.py        # the default model, 0.37 and 1.1 billion random weights

Rates of the device are measured in the same process. Second moments are given, so that none is
estimated. A process of its own takes each model and method, so that peaks are theirs.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

CONTEXTS = ["{}", "It is said. {}", "Long ago, as they tell. {}"]
STEPS, EDITS = 5, 3
#: Models of random weights: width, inner width, blocks, heads and those of keys, untied words.
RANDOM = {"random_0.4b": (1024, 2816, 24, 16, 16), "random_1.1b": (2048, 5632, 22, 32, 4)}


def peak() -> float:
    """Most gigabytes that were held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(name: str, method: str) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    import lightning_edit as le
    from lightning_edit.demos import tiny_tokenizer

    torch.set_num_threads(1)
    began = peak()  # of PyTorch and what it loads
    layers = [5] if method == "ROME" else [3, 4, 5]
    model: Any
    if name in RANDOM:
        width, inner, blocks, heads, key_heads = RANDOM[name]
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            vocab_size=32000,
            architectures=["LlamaForCausalLM"],
        )
        model, tokenizer = LlamaForCausalLM(config).eval(), tiny_tokenizer()
    else:
        model, tokenizer = le.load_model(name), le.load_tokenizer(name)
    editor: Any = getattr(le, method).from_model(
        model, tokenizer, layers=layers, steps=STEPS, context_templates=CONTEXTS, stop_loss=0.0
    )
    for site in editor.sites(editor.tree):
        editor.set_second_moment(site.layer, torch.eye(site.in_features))
    requests = [
        le.EditRequest("The town of {} lies on the", subject, "Marn")
        for subject in ("Badofegu", "Kilomenu", "Parisote", "Vutebado")
    ]
    rows = [editor.tokens.subject_of(requests[0], c.removesuffix("{}")) for c in CONTEXTS]
    answer = len(editor.tokens.target(requests[0].prompt, requests[0].target_new))
    ids, last = rows[0]
    size = {
        "contexts": len(CONTEXTS),
        "steps": STEPS,
        "prompt": sum(len(row) for row, _ in rows) // len(rows) + answer,
        "tail": len(ids) - last + answer - 1,
    }
    editor.commit(editor.edit(requests[0]))
    seconds = time.process_time()
    for request in requests[1:]:
        editor.commit(editor.edit(request))
    seconds = (time.process_time() - seconds) / (len(requests) - 1)
    held = peak() - began
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        planned = le.plan(folder, method, EDITS, layers=layers, **size)
    with FlopCounterMode(display=False) as counter:
        editor.edit(requests[0])
    counted = counter.get_total_flops() / 1e12
    parts = ("capture", "search", "keys", "measure")
    sys.stdout.write(
        f"{name} | {method} | {sum(planned.operations[part] for part in parts) / 1e12:.4f} | "
        f"{counted:.4f} | {planned.seconds_per_edit:.2f} | {seconds:.2f} | "
        f"{planned.total_memory / 1e9:.2f} | {held:.2f}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["smollm2", *RANDOM])
    parser.add_argument("--methods", nargs="+", default=["ROME", "MEMIT"])
    parser.add_argument(
        "--here", action="store_true", help="measure the one named, in this process"
    )
    options = parser.parse_args()
    if options.here:
        [name], [method] = options.models, options.methods
        measure(name, method)
        return
    columns = ("teraflop", "seconds", "gigabytes")
    pairs = (f"{column} planned | {column} measured" for column in columns)
    sys.stdout.write("model | method | " + " | ".join(pairs) + "\n")
    for name, method in itertools.product(options.models, options.methods):
        command = [sys.executable, __file__, "--here", "--models", name, "--methods", method]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        sys.stdout.write(output.splitlines()[-1] + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
