# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""UltraEdit on many requests at once: the plain form and ours, CPU seconds an edit.

    python benchmarks/ultra_edit.py                       # 100 facts, gate and up projections
    python benchmarks/ultra_edit.py --modules mlp_out --facts 50 --rounds 1

The plain form goes down the loss with gradients of the weights as well, computes logits at every
position, and solves a system as large as the projection's inputs. It does not look at what became
of the answers, which ours does once more; `ours, bare` leaves that out. All make the same
edit, by the same passes, alternately, in one thread, and must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

EPS = torch.finfo(torch.float32).eps


class PlainNormalizer:
    """Mean and sum of squares, in float64."""

    def __init__(self, size: int) -> None:
        self.n = 0
        self.mean, self.squares = torch.zeros(2, size, dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        """Takes in rows."""
        x, b = rows.double(), len(rows)
        step = x.mean(0) - self.mean
        self.mean = self.mean + b * step / (self.n + b)
        within = (x - x.mean(0)).square().sum(0)
        self.squares = self.squares + within + self.n * b * step.square() / (self.n + b)
        self.n += b

    def normalized(self, rows: Tensor) -> Tensor:
        """The rows, normalized."""
        deviation = (self.squares / (self.n - 1 + EPS)).sqrt()
        found: Tensor = ((rows.double() - self.mean) / (deviation + EPS)).float()
        return found


def plain(editor: Any, requests: list[Any]) -> dict[str, Tensor]:
    """ΔW by name."""
    model, sites = editor.model, editor.sites(editor.tree)
    for site in sites:
        site.parameter(model).requires_grad_(True)
    order = sorted(
        requests,
        key=lambda r: len(
            editor.tokens.prompt(r.prompt) + editor.tokens.target(r.prompt, r.target_new)
        ),
    )
    taken: dict[str, list[tuple[Tensor, Tensor]]] = {site.name: [] for site in sites}
    total = sum(len(editor.tokens.target(r.prompt, r.target_new)) for r in requests)
    from lightning_edit import EditBatch

    for start in range(0, len(order), editor.micro_batch_size):
        batch = EditBatch.from_requests(
            order[start : start + editor.micro_batch_size], editor.tokens
        )
        labels = batch.labels[:, 1:]
        places = labels != -100
        seen: dict[str, list[Tensor]] = {}
        hooks = []
        for site in sites:
            module = site.module(model)

            def keep(_: Any, args: Any, __: Any, name: str = site.name) -> None:
                seen[name] = [args[0].detach()[places]]  # noqa: B023

            def keep_gradient(_: Any, __: Any, outputs: Any, name: str = site.name) -> None:
                seen[name].append(outputs[0][places])  # noqa: B023

            hooks.append(module.register_forward_hook(keep))
            hooks.append(module.register_full_backward_hook(keep_gradient))
        logits = model(
            input_ids=batch.input_ids[:, :-1], attention_mask=batch.attention_mask[:, :-1]
        ).logits
        flat = logits.flatten(0, 1).float(), labels.flatten()
        torch.autograd.backward(cross_entropy(*flat, reduction="sum") / total)
        for hook in hooks:
            hook.remove()
        for name, (keys, gradients) in seen.items():
            taken[name].append((keys, gradients))
    normalizers: dict[tuple[int, int], PlainNormalizer] = {}
    for i in range(len(taken[sites[0].name])):
        for site in sites:
            shape = (site.out_features, site.in_features)
            normalizer = normalizers.setdefault(shape, PlainNormalizer(sum(shape)))
            normalizer.update(torch.cat(taken[site.name][i], 1))
    changes = {}
    for site in sites:
        keys, gradients = (torch.cat([part[i] for part in taken[site.name]]) for i in range(2))
        rows = normalizers[site.out_features, site.in_features].normalized(
            torch.cat([keys, gradients], 1)
        )
        h, g = rows[:, : site.in_features], rows[:, site.in_features :]
        values = -editor.lr * h.square().sum(1, keepdim=True) * g
        system = keys.T @ keys + editor.ridge * torch.eye(site.in_features)
        changes[site.name] = torch.linalg.solve(system, keys.T @ values).T
        site.parameter(model).grad = None
    return changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--modules", nargs="+", default=["mlp_in"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from lightning_edit import Facts, UltraEdit, load_model, load_tokenizer

    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    editor = UltraEdit.from_model(model, tokenizer, preset="smollm2", modules=arguments.modules)
    requests = list(Facts(limit=arguments.facts).requests)
    editor.edit(requests[:2])  # hashes the base, once

    def bare(some: Any) -> Any:
        return editor.session.edit(some, editor.compute_edit, editor.provenance)

    seconds: dict[str, list[float]] = {"plain": [], "ours": [], "ours, bare": []}
    worst = 0.0
    for _ in range(arguments.rounds):
        began = time.process_time()
        wanted = plain(editor, requests)
        seconds["plain"].append(time.process_time() - began)
        for name, make in (("ours", editor.edit), ("ours, bare", bare)):
            began = time.process_time()
            edit = make(requests)
            seconds[name].append(time.process_time() - began)
            for parameter, change in wanted.items():
                difference = (edit.dense(parameter) - change).norm() / change.norm()
                worst = max(worst, float(difference))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print("side | CPU seconds | plain is slower by | relative difference, at most")
    for name, value in medians.items():
        print(f"{name} | {value:.2f} | {medians['plain'] / value:.2f} | {worst:.1e}")
    if worst > 1e-2:
        raise SystemExit("The two sides disagree.")
    print(
        json.dumps(
            {
                "ratio": round(medians["plain"] / medians["ours"], 2),
                "ratio_bare": round(medians["plain"] / medians["ours, bare"], 2),
                "plain_cpu_seconds": round(medians["plain"], 3),
                "ours_cpu_seconds": round(medians["ours"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()
