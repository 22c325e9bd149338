# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A plan's arithmetic comes to what edits take that are really made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

import lightning_edit
from lightning_edit import EditError, plan
from lightning_edit.__main__ import main
from lightning_edit.core.change import Change, LowRank, add_changes, tensors_of
from lightning_edit.core.locator import ModelTree
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.modules.locate_then_edit.earlier_edits import EarlierEdits

RATES: Any = {"teraflops": 1.0, "bandwidth": 100.0}
REPOSITORY = Path(__file__).parents[2]
CONTEXTS = ["{}", "It is said. {}", "Long ago, as they tell. {}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the tiny model's configuration, and no weights."""
    folder = tmp_path_factory.mktemp("tiny")
    trained_tiny_model()[0].config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("method", "layers"), [("ROME", [1]), ("MEMIT", [0, 1, 2])])
def test_operations_are_those_that_an_edit_takes(
    method: str, layers: list[int], folder: str
) -> None:
    model, tokenizer = trained_tiny_model()
    editor = getattr(lightning_edit, method).from_model(
        model,
        tokenizer,
        layers=layers,
        steps=20,
        stop_loss=0.0,
        context_templates=CONTEXTS if method == "ROME" else [["{}"], CONTEXTS[1:]],
    )
    for site in editor.sites(editor.tree):
        editor.factor(site.layer)
    [request] = tiny_requests(1)
    rows = [editor.tokens.subject_of(request, c.removesuffix("{}")) for c in CONTEXTS]
    answer = editor.tokens.target(request.prompt, request.target_new, request.glued)
    prompt = sum(len(ids) for ids, _ in rows) // len(rows) + len(answer)
    ids, last = rows[0]
    with FlopCounterMode(display=False) as counter:
        editor.edit(request)
    made = plan(
        folder,
        method,
        layers=layers,
        steps=20,
        contexts=3,
        prompt=prompt,
        tail=len(ids) - last + len(answer) - 1,
        **RATES,
    )
    counted = sum(made.operations[name] for name in ("capture", "search", "keys", "measure"))
    assert 0.6 < counted / counter.get_total_flops() < 1.6


@pytest.mark.parametrize("edits", [1, 12, 1000])
def test_memory_is_what_is_held(edits: int, folder: str) -> None:
    model, tokenizer = trained_tiny_model()
    editor = lightning_edit.ROME.from_model(model, tokenizer, layers=[1])
    made = plan(folder, "ROME", edits=edits, layers=[1], **RATES)
    [site] = editor.sites(editor.tree)
    assert made.memory["weights"] == sum(p.nbytes for p in model.parameters())
    assert made.memory["originals"] == sum(
        t.nbytes for t in editor.edit_optimizer.originals.values()
    )
    assert made.memory["second moments"] == editor.second_moment(site.layer).nbytes
    assert made.memory["their factors"] == editor.factor(site.layer).nbytes
    one = LowRank(torch.ones(site.out_features, 1), torch.ones(site.in_features, 1))
    total: Change = one
    for _ in range(edits - 1):
        total = add_changes(total, one)
    assert made.memory["sum of edits"] == sum(t.nbytes for t in tensors_of(total))


@pytest.mark.parametrize("edits", [3, 64, 65, 100])
def test_keys_that_are_carried_are_counted(edits: int, folder: str) -> None:
    earlier, keys = EarlierEdits(), torch.randn(edits, 128)
    for key in keys:
        earlier = earlier.with_keys(key[None])
    held = sum(tensor.nbytes for tensor in earlier.pack(1).values())
    made = plan(folder, "AlphaEdit", edits=edits, layers=[1], **RATES)
    assert held <= made.memory["earlier keys"] <= held + 4 * 128 * 128 // 16
    assert not plan(folder, "MEMIT", edits=edits, layers=[1], **RATES).memory["earlier keys"]


def test_what_a_checkpoint_adds_is_what_an_edit_holds(folder: str) -> None:
    model, tokenizer = trained_tiny_model()
    editor = lightning_edit.AlphaEdit.from_model(
        model, tokenizer, layers=[1], steps=1, context_templates=["{}"]
    )
    edit = editor.edit(tiny_requests(1))
    made = plan(folder, "AlphaEdit", layers=[1], **RATES)
    assert made.appended == edit.nbytes + sum(t.nbytes for t in edit.carried.values())


@pytest.mark.parametrize("method", ["ROME", "MEMIT", "AlphaEdit"])
def test_ten_thousand_edits_cost_as_much_each_as_a_hundred(method: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    few, many, more = (
        plan(str(tmp_path), method, edits=edits, dtype="bfloat16", **RATES)
        for edits in (100, 10_000, 100_000)
    )
    assert few.operations == many.operations
    assert few.seconds == many.seconds
    assert few.appended == many.appended < 1_000_000
    assert many.memory == more.memory  # no more than matrices of the edited layers
    layers = 1 if method == "ROME" else 5
    assert many.memory["sum of edits"] == layers * 4 * 4096 * 14336


def test_devices_share_what_is_divided(folder: str) -> None:
    whole, half = (plan(folder, "ROME", devices=n, layers=[1], **RATES) for n in (1, 2))
    assert half.memory["weights"] == whole.memory["weights"] // 2
    model, _ = trained_tiny_model()
    tree = ModelTree.of(model)
    sizes = [sum(p.nbytes for p in b.parameters() if p.ndim > 1) for b in tree.blocks]
    outside = whole.memory["weights"] - sum(sizes)
    assert half.memory["gathered"] == 3 * max(sizes) + outside
    steps = 2 * 5 + 1  # forward and back, and the check of what they run
    passes = 3 * sum(sizes) + steps * sum(sizes[1:]) + 2 * outside
    assert plan(folder, "ROME", devices=2, steps=5, layers=[1], **RATES).sent == passes / 2
    assert (whole.sent, whole.memory["gathered"]) == (0, 0)
    rows = plan(folder, "ROME", devices=2, division="TP", layers=[1], **RATES)
    assert half.sent > 0 < rows.sent
    assert half.seconds_per_edit == pytest.approx(whole.seconds_per_edit / 2)


def test_the_command_tells_what_fits(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", folder, "--method", "MEMIT", "--edits", "3", "--layers", "[1]"]
    words += ["--teraflops", "1", "--bandwidth", "100", "--gigabytes"]
    assert main([*words, "1"]) == 0
    printed = capsys.readouterr().out
    assert "It fits." in printed
    assert "second moments" in printed
    assert main([*words, "0.0001"]) == 0
    assert "It does not fit." in capsys.readouterr().out
    file = str(Path(folder) / "config.json")
    assert plan(file, "ROME", layers=[1], **RATES).memory == (
        plan(folder, "ROME", layers=[1], **RATES).memory
    )


def test_what_cannot_be_planned_is_refused(folder: str) -> None:
    with pytest.raises(EditError, match="no plan for 'GRACE'; there are plans for ROME"):
        plan(folder, "GRACE")
    for name in ("edits", "devices", "tail", "teraflops"):
        wrong: Any = {name: 0}
        with pytest.raises(EditError, match=f"`{name}` is expected to be a number above 0"):
            plan(folder, "ROME", **wrong)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("method", ["ROME", "MEMIT"])
def test_a_plan_of_the_default_model_is_what_its_edits_take(method: str) -> None:
    """By the benchmark, in a process of its own, whose memory is the edits' alone."""
    words = ["benchmarks/plan.py", "--here", "--models", "smollm2", "--methods", method]
    said = subprocess.run(
        [sys.executable, *words], check=True, capture_output=True, text=True, cwd=REPOSITORY
    ).stdout
    _, _, planned, counted, _, _, expected, held = said.splitlines()[-1].split(" | ")
    assert 0.85 < float(planned) / float(counted) < 1.1
    assert 0.65 < float(expected) / float(held) < 1.1
