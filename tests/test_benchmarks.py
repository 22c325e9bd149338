# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of GPUs runs where there is none, and counts the operations that are made."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_edit import MEMIT, ROME
from lightning_edit.demos import tiny_tokenizer

gpu: Any = importlib.import_module("benchmarks.gpu")
# The model is made of random weights, which take no edit in two passes.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_it_runs_at_tiny_size_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "rows.jsonl"
    gpu.main(["--methods", "AlphaEdit", "--steps", "2", "--counts", "1", "2", "--out", str(out)])
    said = capsys.readouterr().out
    assert said.startswith("no GPU, so the processor; size tiny")
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert json.loads(said.splitlines()[-1])["rows"] == kept[1:]
    rows = {(row["what"], row["count"]): row for row in kept[1:]}
    for count in (1, 2):
        row = rows["AlphaEdit", count]
        assert row["operations"] > 0
        assert 0 < row["search_seconds"] < row["seconds"]
        assert row["each_second"] == pytest.approx(count / row["seconds"])
    names = {what for what, _ in rows}
    assert {"second moments of 3 layers", "generation, tokens of a row"} <= names
    assert "evaluation, teacher-forced" in names


def test_nothing_is_begun_that_the_budget_does_not_allow(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu.main(["--size", "tiny", "--budget", "0", "--methods"])
    said = capsys.readouterr().out
    assert "left out: " in said
    assert all(row["left_out"] for row in json.loads(said.splitlines()[-1])["rows"])


@pytest.mark.parametrize("method", [ROME, MEMIT])
def test_the_needed_operations_are_those_of_its_products(method: Any) -> None:
    model = gpu.build("tiny", torch.device("cpu"))
    words = gpu.Words.of(tiny_tokenizer())
    flat = words.contexts([5, 5])
    contexts = flat if method is ROME else [flat[:1], flat[1:]]
    editor: Any = method.from_model(
        model, tiny_tokenizer(), context_templates=contexts, steps=6, stop_loss=0.0
    )
    request = words.requests(1)
    layers = [site.layer for site in editor.sites(editor.tree)]
    for layer in layers:
        editor.set_second_moment(layer, gpu.second_moment(256, torch.device("cpu")))
        editor.factor(layer)
    with FlopCounterMode(display=False) as counter:
        editor.edit(request)
    products = ("aten.mm", "aten.addmm")
    counts = counter.get_flop_counts()["Global"]
    made = sum(n for op, n in counts.items() if str(op).startswith(products))
    needed = gpu.Shapes.of(model).edit(editor, request).operations
    # What is made and not needed: padding of the anchor, a row that is run for comparison, the look
    # at the written model.
    assert 0.5 * made < needed < made
