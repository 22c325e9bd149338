# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Closed forms and statistics of mass editors against their plain forms, CPU seconds, one thread.

    python benchmarks/closed_forms.py

* AlphaEdit's update of 10 requests with 300 earlier keys, at the width of a model of seven billion
  weights: the paper's system of the inputs in float32, against the system of the keys in float64.
* MEMIT's update of 10 requests at that width: a dense float64 solve, against the system of the keys
  with a Cholesky factor of the second moment that is made once (the time of that is given apart).
* Second moments of five layers of the default model: as the papers' code has it, a pass for each
  layer that ends there, and whole products of keys; against one pass for all layers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_edit import PromptTokenizer, load_model, load_tokenizer
from lightning_edit.core.locator import ModelTree
from lightning_edit.evaluation.prose import read_prose
from lightning_edit.functional.least_squares import factorize, preserving_update, projected_update
from lightning_edit.modules.locate_then_edit.second_moment import second_moments, text_file_ids

OLD, NEW, OUTPUTS = 300, 10, 512
LAYERS = [4, 5, 6, 7, 8]


def alternate(
    plain: Callable[[], Any], ours: Callable[[], Any], turns: int
) -> tuple[float, float, Any, Any]:
    """Median CPU seconds of both sides, taken in turns, and what they found."""
    seconds: tuple[list[float], list[float]] = ([], [])
    found: list[Any] = [None, None]
    for _ in range(turns):
        for side, run in enumerate((plain, ours)):
            began = time.process_time()
            found[side] = run()
            seconds[side].append(time.process_time() - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1]), found[0], found[1]


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def alpha_edit(width: int, turns: int) -> tuple[float, float, float]:
    """The update with earlier keys; plain: [P (K Kᵀ + c) + λ I]⁻¹ P K Rᵀ."""
    protected = torch.linalg.qr(torch.randn(width, width // 4)).Q
    projector = torch.eye(width) - protected @ protected.T
    old, new, residuals = (
        torch.randn(width, OLD),
        torch.randn(width, NEW),
        torch.randn(OUTPUTS, NEW),
    )
    gram = old @ old.T  # which the plain form keeps from edit to edit

    def plain() -> Tensor:
        system = projector @ (new @ new.T + gram) + torch.eye(width)
        change: Tensor = torch.linalg.solve(system, projector @ new @ residuals.T).T
        return change

    def ours() -> Tensor:
        u, v = projected_update(torch.cat([old, new], 1), residuals, protected, 1.0)
        return u @ v.T

    slow, fast, wanted, found = alternate(plain, ours, turns)
    return slow, fast, difference(found, wanted)


def memit(width: int, turns: int) -> tuple[float, float, float, float]:
    """The update of a batch; plain: R Kᵀ (λ C + K Kᵀ)⁻¹ in float64."""
    keys = torch.randn(2 * width, width) * torch.logspace(0, -1.5, width)
    moment = keys.T @ keys / len(keys)
    new, residuals, weight = torch.randn(width, NEW), torch.randn(OUTPUTS, NEW), 100.0
    began = time.process_time()
    factor = factorize(moment)
    once = time.process_time() - began

    def plain() -> Tensor:
        k = new.double()
        solved: Tensor = torch.linalg.solve(weight * moment.double() + k @ k.T, k)
        return residuals.double() @ solved.T

    def ours() -> Tensor:
        u, v = preserving_update(new, residuals, factor, weight)
        return u @ v.T

    slow, fast, wanted, found = alternate(plain, ours, turns)
    return slow, fast, difference(found, wanted), once


class Stop(Exception):  # noqa: N818  # control flow, not an error
    """Ends a pass at the layer that is asked for."""


@torch.no_grad()
def plain_moment(tree: ModelTree, layer: int, rows: Tensor) -> Tensor:
    """Second moment of one layer, in batches of as many rows as ours."""
    module = tree.mlp_out(layer).module(tree.model)
    sums = []

    def add(_: Any, args: tuple[Tensor, ...]) -> None:
        keys = args[0].reshape(-1, args[0].shape[-1])
        sums.append(keys.T @ keys)
        raise Stop

    hook = module.register_forward_pre_hook(add)
    model: Any = tree.model
    for batch in torch.split(rows, 64):
        with contextlib.suppress(Stop):
            model.base_model(input_ids=batch, use_cache=False)
    hook.remove()
    return torch.stack(sums).sum(0) / rows.numel()


def moments(turns: int) -> tuple[float, float, float]:
    """Second moments of five layers from about six thousand tokens of text."""
    tree = ModelTree.of(load_model("smollm2"))
    tokens = PromptTokenizer(load_tokenizer("smollm2"))
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("\n".join([read_prose()] * 20), encoding="utf-8")

        width = tree.mlp_out(LAYERS[0]).in_features
        rows = text_file_ids(tokens, text, 4 * width)

        def plain() -> dict[int, Tensor]:
            return {layer: plain_moment(tree, layer, rows) for layer in LAYERS}

        def ours() -> dict[int, Tensor]:
            return second_moments(tree, tokens, LAYERS, model_hash="", text=str(text), ridge=0.0)

        slow, fast, wanted, found = alternate(plain, ours, turns)
    return slow, fast, max(difference(found[layer], wanted[layer]) for layer in LAYERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--width", type=int, default=4096, help="inputs of the edited matrix")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    alpha = alpha_edit(options.width, options.turns)
    batch = memit(options.width, options.turns)
    stats = moments(options.turns)
    out = ["what | plain, CPU s | ours, CPU s | ratio | relative difference"]
    ratio = {}
    for name, (slow, fast, error) in (
        ("alpha_edit", alpha),
        ("memit", batch[:3]),
        ("second_moments", stats),
    ):
        ratio[name] = round(slow / fast, 1)
        out.append(f"{name} | {slow:.2f} | {fast:.3f} | {ratio[name]} | {error:.1e}")
    out.append(f"factor of the second moment, made once: {batch[3]:.2f} s")
    out.append(json.dumps({"ratio": ratio}))
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
