# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""FT and its variants against plain PyTorch and against figures of the reference code."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lightning_edit import EditBatch, EditRequest, FineTune, PromptTokenizer
from lightning_edit.core.errors import EditError
from lightning_edit.core.locator import ModelTree
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.modules.fine_tuning import fine_tune
from lightning_edit.modules.fine_tuning.inner_loop import InnerLoop
from lightning_edit.passes.target_loss import row_means, target_nll
from tests.modules.helpers import (
    autoregressive,
    bare_trainer,
    plain_nll,
    same,
    same_edit,
    snapshot,
)
from tests.zoo import DECODERS, ENCODER_DECODERS, build


def _editor(**settings: Any) -> FineTune:
    return FineTune.from_model(*trained_tiny_model(), **{"lr": 2e-2, **settings})


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODER_DECODERS])
def test_target_loss_is_that_of_single_rows(kind: str) -> None:
    model = build(kind)
    tree = ModelTree.of(model)
    tokens = PromptTokenizer(tiny_tokenizer(), is_encoder_decoder=tree.is_encoder_decoder)
    requests = tiny_requests(5)
    batch = EditBatch.from_requests(requests, tokens)
    assert len({int(n) for n in batch.prompt_lengths}) > 1
    pairs = [(tokens.prompt(r.prompt), tokens.target(r.prompt, r.target_new)) for r in requests]
    with torch.no_grad():
        rows = [torch.stack(plain_nll(model, prompt, target)) for prompt, target in pairs]
        torch.testing.assert_close(target_nll(tree, batch), torch.cat(rows))
        means = row_means(target_nll(tree, batch), batch.labels)
        torch.testing.assert_close(means, torch.stack([row.mean() for row in rows]))
        # All tokens read where the first one is.
        last = [
            plain_nll(model, prompt, [token])[0] for prompt, target in pairs for token in target
        ]
        found = target_nll(tree, batch, "prompt_last")
        torch.testing.assert_close(found, torch.stack(last))
        part = batch.select([1])  # padded further than it needs
        torch.testing.assert_close(target_nll(tree, part), rows[1])


def test_edit_takes_and_is_undone() -> None:
    editor = _editor()
    before = snapshot(editor.model)
    requests = tiny_requests(2)
    edit = editor.edit(requests)
    assert same(editor.model, before)
    assert list(edit.changes) == ["model.layers.3.mlp.down_proj.weight"]
    edit.apply_(editor.model)
    assert autoregressive(editor, requests, "reliability") == 1.0
    for row, request in zip(edit.details["requests"], requests, strict=True):
        assert row["id"] == request.id
        assert row["p_target"] > 0.95
        assert row["norm"] == edit.norm()
    edit.revert_(editor.model)
    assert same(editor.model, before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    ("objective", "bound"), [("target_new", None), ("prompt_last", None), ("target_new", 1e-3)]
)
def test_three_steps_are_those_of_plain_pytorch(kind: Any, objective: Any, bound: Any) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    editor = FineTune.from_model(
        model, tokenizer, layers=[1], steps=3, chunk_size=2, objective=objective,
        norm_constraint=bound, weight_decay=0.1,
    )  # fmt: skip
    [name] = editor.edit_optimizer.originals
    requests = tiny_requests(3)
    edit = editor.edit(requests)

    tokens = editor.tokens
    weight = model.get_parameter(name)
    start = weight.detach().clone()
    adam = Adam([weight], lr=5e-4, weight_decay=0.1)
    for _ in range(3):
        for chunk in (requests[:2], requests[2:]):
            rows: list[Tensor] = []
            for r in chunk:
                prompt, target = tokens.prompt(r.prompt), tokens.target(r.prompt, r.target_new)
                if objective == "prompt_last":
                    nll = [plain_nll(model, prompt, [token])[0] for token in target]
                else:
                    nll = plain_nll(model, prompt, target)
                rows.append(torch.stack(nll).mean())
            adam.zero_grad()
            torch.autograd.backward(torch.stack(rows).mean())
            adam.step()
            if bound is not None:
                with torch.no_grad():
                    weight.copy_(torch.clamp(weight, start - bound, start + bound))
    change = weight.detach() - start
    error = torch.linalg.vector_norm(edit.dense(name) - change)
    assert error <= 1e-3 * torch.linalg.vector_norm(change)
    if bound is not None:
        assert float(edit.dense(name).abs().max()) <= bound * (1 + 1e-3)
        at_bound = edit.dense(name).abs() >= 0.999 * bound
        assert float(at_bound.float().mean()) > 0.4


def test_learned_chunks_make_no_step() -> None:
    # The world's own facts are known already: nothing is learned, and one pass is enough.
    known = [
        EditRequest(r.prompt, r.subject, r.target_old or "", id=r.id) for r in tiny_requests(3)
    ]
    edit = _editor(stop_loss=0.5).edit(known)
    assert not edit.changes
    assert [row["steps"] for row in edit.details["requests"]] == [0, 0, 0]
    assert [len(seen) for seen in edit.details["losses"]] == [1, 1, 1]
    # One new among them: only its chunk makes steps, until all are below the bound.
    mixed = [known[0], tiny_requests(2)[1]]
    edit = _editor(stop_loss=0.5, chunk_size=1, lr=5e-2).edit(mixed)
    first, second = edit.details["requests"]
    assert first["steps"] < second["steps"] < 25
    assert (first["loss"] + second["loss"]) / 2 < 0.5


def test_chunks_make_a_step_each() -> None:
    for size, steps in ((1, 2), (3, 2), (7, 2)):
        edit = _editor(steps=2, chunk_size=size, stop_loss=0.0).edit(tiny_requests(5))
        assert [row["steps"] for row in edit.details["requests"]] == [steps] * 5
    one = _editor(steps=1, chunk_size=5).edit(tiny_requests(5))
    five = _editor(steps=1, chunk_size=1).edit(tiny_requests(5))
    assert five.norm() > 1.5 * one.norm()


def test_what_stands_below_runs_once_for_the_same_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = _editor(layers=[1], steps=3, stop_loss=0.0)
    runs: list[int] = []
    below = editor.model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    once, count = editor.edit(tiny_requests(2)), len(runs)
    monkeypatch.setattr(fine_tune, "REPLAYED_CHUNKS", 1)
    runs.clear()
    again = editor.edit(tiny_requests(2))
    below.remove()
    assert len(runs) - count == 2 * (3 - 1)  # each chunk in each pass but the first
    assert same_edit(once, again)


def test_all_parameters_of_the_model_or_of_a_layer() -> None:
    editor = _editor(parameters="all", lr=2e-3)
    edit = editor.edit(tiny_requests(1))
    assert len(edit.changes) == len(list(editor.model.parameters()))
    with edit.applied(editor.model):
        assert autoregressive(editor, tiny_requests(1), "reliability") == 1.0
    layer = _editor(parameters="all", layers=[2]).edit(tiny_requests(1))
    assert all(name.startswith("model.layers.2.") for name in layer.changes)
    assert len(layer.changes) == 9


def test_low_precision_weights_are_tuned_in_float32() -> None:
    model, tokenizer = trained_tiny_model()
    editor = FineTune.from_model(model.to(torch.bfloat16), tokenizer, lr=1e-5, steps=2)
    edit = editor.edit(tiny_requests(1))
    [change] = edit.changes.values()
    # Two steps of Adam, which bfloat16 would have swallowed where weights are large.
    assert change.dtype == torch.float32  # type: ignore[union-attr]
    moved = change[change != 0].abs()  # type: ignore[index]
    assert moved.numel() > 0.9 * edit.dense(next(iter(edit.changes))).numel()
    assert float(moved.max()) < 2.1e-5


def test_sequential_fit_commits_one_edit_a_batch() -> None:
    editor = _editor()
    before = snapshot(editor.model)
    trainer = bare_trainer(max_epochs=1)
    data = EditDataModule(requests=tiny_requests(4), batch_size=2)
    trainer.fit(editor, datamodule=data)
    assert trainer.global_step == 2
    assert [row["id"] for row in editor.history] == [r.id for r in tiny_requests(4)]
    assert autoregressive(editor, tiny_requests(4)[2:], "reliability") == 1.0
    editor.committed().revert_(editor.model)
    assert same(editor.model, before)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"norm_constraint": 0.0}, "norm"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        FineTune(**settings)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "FT-L_single_token_L21_eps5e-5_5steps": (
        "Rome", {"objective": "prompt_last", "norm_constraint": 5e-5, "steps": 5}),
    "FT-L_single_token_L21_eps2e-4_5steps": (
        "Rome", {"objective": "prompt_last", "norm_constraint": 2e-4, "steps": 5}),
    "FT-L_two_token_promptlast_L21_eps5e-5_5steps": (
        "Buenos Aires", {"objective": "prompt_last", "norm_constraint": 5e-5, "steps": 5}),
    "FT-promptlast_noconstraint_L21_5steps": ("Rome", {"objective": "prompt_last", "steps": 5}),
    "FT-M_two_token_L21_10steps": ("Buenos Aires", {"steps": 10}),
    "FT-M_two_token_L21_eps5e-5_10steps": (
        "Buenos Aires", {"norm_constraint": 5e-5, "steps": 10}),
    "FT_all_layers_adam1e-5_3steps": (
        "Buenos Aires", {"parameters": "all", "lr": 1e-5, "steps": 3}),
}  # fmt: skip


@pytest.mark.real
def test_every_golden_case_is_here(goldens: Path) -> None:
    assert set(json.loads((goldens / "ft" / "outputs.json").read_text())) == set(CASES)


@pytest.mark.real
@pytest.mark.parametrize("case", CASES)
def test_goldens(case: str, goldens: Path, default_model: tuple[Any, Any]) -> None:
    wanted = json.loads((goldens / "ft" / "outputs.json").read_text())[case]
    target, settings = CASES[case]
    model, tokenizer = default_model
    editor = FineTune.from_model(model, tokenizer, **settings)
    edit = editor.edit(EditRequest("The capital of France is", "France", target))
    assert edit.details["losses"][0] == pytest.approx(wanted["losses"], rel=1e-3)
    p_target = edit.details["requests"][0]["p_target"]
    assert -math.log(p_target) == pytest.approx(wanted["target_nll_post"], rel=1e-3)
    assert edit.norm() == pytest.approx(wanted.get("dW_norm") or wanted["dtheta_norm"], rel=1e-3)
    for name, norm in wanted.get("selected_norms", {}).items():
        assert edit.norms()[name] == pytest.approx(norm, rel=1e-3)
    if "param" in wanted:
        assert list(edit.changes) == [wanted["param"]]
        change = edit.dense(wanted["param"])
        assert float(change.abs().max()) == pytest.approx(wanted["dW_maxabs"], rel=1e-3)
        assert change.flatten()[:8].tolist() == pytest.approx(
            wanted["dW_first8"], rel=1e-3, abs=1e-2 * edit.norm() / math.sqrt(change.numel())
        )
        bound = settings.get("norm_constraint")
        if bound is not None:
            share = float((change.abs() >= 0.999 * bound).float().mean())
            assert share == pytest.approx(wanted["dW_frac_at_bound"], abs=1e-3)


def test_a_loss_that_no_tuned_parameter_has_a_part_in_is_an_error() -> None:
    layers = nn.ModuleDict({"read": nn.Linear(2, 1), "other": nn.Linear(2, 1)})
    inner = InnerLoop(layers, ["other.weight"], lambda p: SGD(p, lr=1.0))
    with pytest.raises(EditError, match=r"no gradient at other\.weight"):
        inner.step(layers["read"](torch.ones(1, 2)).sum())
