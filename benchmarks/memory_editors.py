# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What remembered edits cost: CPU seconds of an answer, against the model without a memory.

    python benchmarks/memory_editors.py                       # 0, 10, 100 and 1000 edits
    python benchmarks/memory_editors.py --counts 0 1000 --tokens 16

A prompt is continued greedily, with the memory empty and with it full, turn by turn in one run; the
figure is the ratio of the medians. The entries are noise that answers no prompt, so what is timed
is the looking up; SCR tells the nearest fact all the same, so that the longer prompt is timed, too.
In the rows of SERAC that end in "answering", edits of the prompts themselves are among the entries,
so that its second model answers. One thread, float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_edit import (
    GRACE,
    SCR,
    SERAC,
    WISE,
    CaliNET,
    Facts,
    TPatcher,
    load_model,
    load_tokenizer,
)
from lightning_edit.core.side_memory import EditMemory, MemoryEntry
from lightning_edit.modules.memory_based.base import MemoryModule

# A small share of the matrix: how many of its entries a copy may change does not show in its use.
EDITORS: dict[str, tuple[type[MemoryModule], dict[str, Any]]] = {
    "GRACE": (GRACE, {}),
    "WISE": (WISE, {"keep_ratio": 0.01, "copy_size": 500, "merged_copies": 2}),
    "WISE, 10 a copy": (WISE, {"keep_ratio": 0.01}),
    "TPatcher": (TPatcher, {}),
    "CaliNET": (CaliNET, {}),
    "SERAC": (SERAC, {"pretrained": True}),
    "SERAC, answering": (SERAC, {"pretrained": True}),
    "SCR": (SCR, {}),
}


def noise(editor: MemoryModule, count: int) -> dict[str, MemoryEntry]:
    """Entries of an editor's memory that answer no prompt."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    memory: Any = editor.memory
    size = editor.tree.hidden_size
    entries: dict[str, MemoryEntry] = {}
    for i in range(count):
        notes: dict[str, Any] = {}
        match editor:
            case GRACE():
                site = editor.tree.mlp_out(editor.default_layers(editor.tree)[0])
                keys, values = draw(site.in_features), draw(site.out_features)
                tensors = {"keys": keys, "values": values, "radii": torch.tensor(1e-6)}
            case WISE():
                changes = 1e-3 * draw(len(memory.mask(memory.copy_of(i))))
                tensors = {"changes": changes, "distances": torch.tensor(1e9)}
                notes = {"number": i}
            case TPatcher():
                tensors = {"keys": draw(size), "biases": torch.tensor(-1e6)}
                tensors |= {"values": draw(size), "queries": draw(size)}
            case CaliNET():
                if i % editor.slots:  # a block for as many facts as it has slots
                    continue
                # States have no common direction: half of the slots fire at any.
                tensors = {"keys": draw(1, 1, editor.slots, size)}
                tensors |= {"values": 1e-9 * draw(1, editor.slots, size)}
                notes = {"number": i}
            case SERAC():
                tensors = {"embeddings": 1e3 * draw(editor.width)}
                notes = {"ids": [], "number": i, "overrides": []}
            case _:
                tensors = {"embeddings": torch.nn.functional.normalize(draw(size), dim=0)}
                notes = {"context": "", "fact": "The capital of France is Rome"}
        entries[str(i)] = MemoryEntry(tensors, {str(i): {}}, notes)
    return entries


def seconds(editor: MemoryModule, prompt: str, tokens: int) -> float:
    """CPU time to continue a prompt."""
    began = time.process_time()
    [text] = editor.memory.rewrite([prompt], editor.tokens)
    ids = torch.tensor([editor.tokens.prompt(text)])
    editor.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=editor.tokens.pad_id,
    )
    return time.process_time() - began


def answering(editor: SERAC, count: int) -> dict[str, MemoryEntry]:
    """Entries of which some answer the prompts of the demo facts.

    Its classifier was not trained, so that the prompts' own embeddings stand for those of edits.
    """
    requests = list(Facts(demo=True).requests[:count])
    if not requests:
        return {}
    edit = editor.edit(requests)
    places = editor.scopes.encode([editor.tokens.prompt(r.prompt) for r in requests])
    own: dict[str, MemoryEntry] = {
        name: replace(entry, tensors={"embeddings": place})
        for (name, entry), place in zip(edit.entries.items(), places, strict=True)
        if entry is not None
    }
    return {**noise(editor, count - len(own)), **own}


def measure(
    editor: MemoryModule, entries: dict[str, MemoryEntry], rounds: int, tokens: int
) -> tuple[float, float]:
    """Median seconds without and with some entries."""
    memory: EditMemory = editor.memory
    prompts = [request.prompt for request in Facts(demo=True).requests]
    empty: list[float] = []
    full: list[float] = []
    for i in range(rounds + 1):  # the first round warms up
        for held, times in (({}, empty), (entries, full)):
            memory.write(held)
            times.append(seconds(editor, prompts[i % len(prompts)], tokens))
    memory.write({})
    return statistics.median(empty[1:]), statistics.median(full[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--counts", type=int, nargs="+", default=[0, 10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--editors", nargs="+", default=list(EDITORS), choices=list(EDITORS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    ratios: dict[str, dict[str, float]] = {}
    base: dict[str, dict[str, float]] = {}
    print("editor | edits | without | with | ratio")
    for name in arguments.editors:
        cls, settings = EDITORS[name]
        editor = cls.from_model(model, tokenizer, preset="smollm2", **settings)
        fill: Any = answering if name.endswith("answering") else noise
        ratios[name], base[name] = {}, {}
        for count in arguments.counts:
            entries = fill(editor, count)
            without, with_it = measure(editor, entries, arguments.rounds, arguments.tokens)
            ratio = with_it / without
            ratios[name][str(count)], base[name][str(count)] = round(ratio, 3), round(without, 4)
            print(f"{name} | {count} | {without:.3f} | {with_it:.3f} | {ratio:.2f}", flush=True)
        editor.memory.detach_()
    print(json.dumps({"ratio": ratios, "base_cpu_seconds": base, "tokens": arguments.tokens}))


if __name__ == "__main__":
    main()
