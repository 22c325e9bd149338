# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""One step of training MEND: a plain reference step and ours, CPU seconds and extra memory.

    python benchmarks/hypernetworks.py               # the default model, nine matrices
    python benchmarks/hypernetworks.py --rounds 3 --malmen 8 64

The plain step takes gradients of all the model's parameters, makes ΔW a dense matrix and gives the
model dense fast weights, as the authors' code does. Both train the same network on the same single
edits, by turns, and must agree. Time is measured by turns in one process, in one thread; the memory
that a step takes above what stood before it, in a process for each side. `--malmen` times edits
with so many facts at once by an untrained MALMEN.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy


def plain_step(editor: Any, request: Any) -> Tensor:
    """The loss of one edit, with its gradient left in the network's parameters."""
    from lightning_edit.core.batch import EditBatch
    from lightning_edit.core.processes import Processes
    from lightning_edit.modules.meta_learning.training_batch import TrainingBatch

    model, network = editor.model, editor.network
    batch = TrainingBatch.from_requests([request], editor.tokens)

    def logits_of(batch: EditBatch, weights: dict[str, Tensor]) -> Tensor:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        found: Tensor = functional_call(
            model, weights, kwargs={**inputs, "use_cache": False}
        ).logits
        return found

    def nll_of(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model.requires_grad_(True)
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for site in editor.sites:

        def keep(_: Any, args: Any, __: Any, name: str = site.name) -> None:
            seen[name] = [args[0].detach()]

        def keep_gradient(_: Any, __: Any, outputs: Any, name: str = site.name) -> None:
            seen[name].append(outputs[0])

        module = site.module(model)
        hooks.append(module.register_forward_hook(keep))
        hooks.append(module.register_full_backward_hook(keep_gradient))
    torch.autograd.backward(nll_of(logits_of(batch.inner, {}), batch.inner.labels))
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        before = logits_of(batch.locality, {}).log_softmax(-1)
    weights = dict(model.named_parameters())
    places: dict[str, int] = {}
    for site, edit_lr in zip(editor.sites, network.edit_lr, strict=True):
        key = f"{site.out_features}x{site.in_features}"
        matrix = places.setdefault(key, 0)
        places[key] += 1
        u, d = (rows.flatten(0, 1) for rows in seen[site.name])
        used = u.any(1) & d.any(1)
        network.by_shape[key].learn(u[used], d[used], Processes())
        u, d = network.by_shape[key](u[used], d[used], matrix)
        weights[site.name] = weights[site.name] - edit_lr * (d.T @ u)
    edit = nll_of(logits_of(batch.outer, weights), batch.outer.labels)
    after = logits_of(batch.locality, weights).log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).mean()
    loss = 0.1 * edit + kl
    torch.autograd.backward(loss)
    return loss.detach()


def our_step(editor: Any, request: Any) -> Tensor:
    """The same."""
    from lightning_edit.core.processes import Processes

    loss, _ = editor.edit_loss([request], Processes())
    torch.autograd.backward(loss)
    found: Tensor = loss.detach()
    return found


STEPS = {"plain": plain_step, "ours": our_step}


def editor_and_requests(rank: int) -> tuple[Any, list[Any]]:
    from lightning_edit import MEND, Facts, load_model, load_tokenizer

    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    requests = [r for r in Facts(limit=20).requests if r.rephrases and r.locality]
    return MEND.from_model(model, tokenizer, preset="smollm2", rank=rank), requests


def take(side: str, editor: Any, optimizer: Any, request: Any) -> tuple[float, float]:
    """A whole step; its CPU seconds and its loss."""
    editor.model.requires_grad_(False)
    began = time.process_time()
    loss = STEPS[side](editor, request)
    torch.nn.utils.clip_grad_norm_(editor.network.parameters(), 100)
    optimizer.step()
    optimizer.zero_grad()
    editor.model.zero_grad()
    return time.process_time() - began, float(loss)


def status(name: str) -> float:
    """A figure of this process's memory, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    [line] = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) / 1024


def extra_memory(side: str, rank: int) -> float:
    """Peak of a second step above what stood before it, in MiB, in this process."""
    editor, requests = editor_and_requests(rank)
    optimizer = editor.configure_optimizers()
    for parameter in editor.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # moments stand before either side's step
    optimizer.zero_grad()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = status("VmRSS")
    take(side, editor, optimizer, requests[0])
    return status("VmHWM") - before


def time_malmen(editor: Any, facts: int) -> float:
    """CPU seconds of one edit with so many facts by an untrained network without statistics."""
    from lightning_edit import MALMEN, EditBatch, Facts

    requests = list(Facts().requests)
    few = [requests[i % len(requests)] for i in range(facts)]
    malmen = MALMEN.from_model(
        editor.model,
        editor.tokens.tokenizer,
        preset="smollm2",
        layers=[27, 28, 29],  # those of MEND
        normalize=False,
    )
    began = time.process_time()
    malmen.edit(EditBatch.from_requests(few, editor.tokens))
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=1920)
    parser.add_argument("--malmen", type=int, nargs="*", default=[])
    parser.add_argument("--memory-of", choices=list(STEPS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        print(extra_memory(arguments.memory_of, arguments.rank))
        return
    memory = {}
    for side in STEPS:
        words = [sys.executable, __file__, "--rank", str(arguments.rank), "--memory-of", side]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        memory[side] = float(done.stdout.split()[-1])
    editor, requests = editor_and_requests(arguments.rank)
    optimizer = editor.configure_optimizers()
    begun = {name: t.clone() for name, t in editor.network.state_dict().items()}
    seconds: dict[str, list[float]] = {side: [] for side in STEPS}
    worst = 0.0
    for i in range(arguments.rounds + 1):
        losses = {}
        for side in STEPS:
            editor.network.load_state_dict(begun)  # both sides step from the same network
            spent, losses[side] = take(side, editor, optimizer, requests[i % len(requests)])
            if i:  # the first one warms up
                seconds[side].append(spent)
        worst = max(worst, abs(losses["plain"] / losses["ours"] - 1))
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    print("side | CPU seconds a step | extra memory, MiB")
    for side in STEPS:
        print(f"{side} | {medians[side]:.2f} | {memory[side]:.0f}")
    print(f"losses differ by {worst:.1e} at most")
    if worst > 1e-3:
        raise SystemExit("The two sides disagree.")
    edits = {facts: time_malmen(editor, facts) for facts in arguments.malmen}
    for facts, spent in edits.items():
        print(f"MALMEN, {facts} facts at once: {spent:.1f} CPU seconds")
    print(
        json.dumps(
            {
                "step_ratio": round(medians["plain"] / medians["ours"], 2),
                "memory_ratio": round(memory["ours"] / memory["plain"], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
