# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""LoRA as an editor: peft's mathematics, exact low-rank edits, a model left as it was."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Adam

from lightning_edit import EditRequest, LoRA, WeightDelta
from lightning_edit.core.change import LowRank
from lightning_edit.core.errors import LocatorError, MissingDependencyError
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.modules.fine_tuning.adapter_layers import AdapterLayers, adapter_sites
from tests.modules.helpers import autoregressive, plain_nll, same, snapshot
from tests.zoo import DECODERS, ENCODER_DECODERS, build

NAME = "model.layers.0.self_attn.q_proj.weight"


def _editor(**settings: Any) -> LoRA:
    return LoRA.from_model(*trained_tiny_model(), **{"stop_loss": 5e-2, **settings})


def test_edit_takes_and_is_undone() -> None:
    editor = _editor()
    before, modules = snapshot(editor.model), list(editor.model.named_modules())
    requests = tiny_requests(3)
    edit = editor.edit(requests)
    assert same(editor.model, before)
    assert [(n, id(m)) for n, m in editor.model.named_modules()] == [(n, id(m)) for n, m in modules]
    assert len(edit.changes) == 8
    assert {change.rank for change in edit.changes.values() if isinstance(change, LowRank)} == {8}
    edit.apply_(editor.model)
    assert autoregressive(editor, requests, "reliability") == 1.0
    rows = edit.details["requests"]
    assert [row["id"] for row in rows] == [r.id for r in requests]
    assert min(row["p_target"] for row in rows) > 0.9
    assert rows[0]["steps"] < 70
    assert 0 < rows[0]["loss"] < 0.1
    edit.revert_(editor.model)
    assert same(editor.model, before)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_edit_is_what_peft_trains_and_merges(kind: Any) -> None:
    from peft import LoraConfig, get_peft_model

    editor = LoRA.from_model(
        tiny_model(kind), tiny_tokenizer(), rank=4, alpha=8.0, steps=4, stop_loss=0.0, seed=3
    )
    requests = tiny_requests(3)
    edit = editor.edit(requests)
    sites = adapter_sites(editor.model)
    drawn = AdapterLayers(editor.model, sites, rank=4, alpha=8.0, seed=3).state()

    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, fan_in_fan_out=kind == "gpt2",
        target_modules=[site.module_name for site in sites],
    )  # fmt: skip
    model: Any = get_peft_model(tiny_model(kind), config)
    factors = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(drawn[name.removeprefix("base_model.model.")])
            factors.append(parameter)
    assert len(factors) == 2 * len(sites)
    adam = Adam(factors, lr=5e-3)
    tokens = editor.tokens
    for _ in range(4):
        nll = [
            token
            for r in requests
            for token in plain_nll(
                model, tokens.prompt(r.prompt), tokens.target(r.prompt, r.target_new)
            )
        ]
        adam.zero_grad()
        torch.autograd.backward(torch.stack(nll).mean())
        adam.step()
    merged = model.merge_and_unload()
    prompt = torch.tensor([tokens.prompt(requests[0].prompt)])
    inputs = {"decoder_input_ids": torch.tensor([[0, 5]])} if kind == "t5" else {}
    with torch.no_grad(), edit.applied(editor.model):
        found = editor.model(input_ids=prompt, **inputs).logits
        torch.testing.assert_close(found, merged(input_ids=prompt, **inputs).logits)
        for name, weight in merged.named_parameters():
            torch.testing.assert_close(editor.model.get_parameter(name), weight)


def test_change_is_the_adapter_in_both_layouts() -> None:
    for kind in ("llama", "gpt2"):
        model = tiny_model(kind)
        sites = adapter_sites(model, [1])
        adapter = AdapterLayers(model, sites, rank=3, alpha=6.0, seed=0)
        for factor in adapter.parameters:
            torch.nn.init.normal_(factor)
        ids = torch.arange(2, 12)[None]
        before = model(ids).logits
        with adapter.attached():
            with_layers = model(ids).logits
        assert torch.equal(model(ids).logits, before)
        delta = WeightDelta(adapter.changes())
        with delta.applied(model):
            torch.testing.assert_close(model(ids).logits, with_layers, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(with_layers, before)


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODER_DECODERS])
def test_queries_and_values_are_found_in_every_family(kind: str) -> None:
    names = {site.module_name.rpartition(".")[2] for site in adapter_sites(build(kind))}
    fused = {"gpt2": {"c_attn"}, "gptneox": {"query_key_value"}, "falcon": {"query_key_value"}}
    fused["phi3"] = {"qkv_proj"}
    assert names in (fused.get(kind), {"q_proj", "v_proj"}, {"q", "v"})


def test_stacks_layers_and_names() -> None:
    t5 = tiny_model("t5")
    names = [site.name for site in adapter_sites(t5)]
    assert sum(name.startswith("encoder") for name in names) == len(names) / 2 == 8
    assert [s.name for s in adapter_sites(t5, [-1], ["wo", "q"])] == [
        "decoder.block.3.layer.0.SelfAttention.q.weight",
        "decoder.block.3.layer.2.DenseReluDense.wo.weight",
    ]
    experts = build("mixtral")  # whose MLPs have no single matrix
    assert len(adapter_sites(experts, [0], ["o_proj"])) == 1
    with pytest.raises(LocatorError, match="mlp_up"):
        adapter_sites(tiny_model(), None, ["q_proj", "mlp_up"])


def test_edits_an_encoder_decoder() -> None:
    editor = LoRA.from_model(tiny_model("t5"), tiny_tokenizer(), lr=2e-2, steps=40)
    edit = editor.edit(tiny_requests(2))
    first, last = (sum(seen[i] for seen in edit.details["losses"]) for i in (0, -1))
    assert last < 0.6 * first


def test_known_answers_need_no_edit() -> None:
    request = tiny_requests(1)[0]
    known = EditRequest(request.prompt, request.subject, request.target_old or "")
    edit = _editor(stop_loss=0.5).edit(known)
    assert not edit.changes
    assert edit.details["requests"][0]["steps"] == 0


def test_seed_decides() -> None:
    first, again, other = (_editor(seed=s, steps=2).edit(tiny_requests(1)) for s in (1, 1, 2))
    assert torch.equal(first.dense(NAME), again.dense(NAME))
    assert not torch.allclose(first.dense(NAME), other.dense(NAME))


def test_the_adapter_as_it_begins_can_be_read() -> None:
    editor = LoRA.from_model(*trained_tiny_model(), layers=[2], rank=2, seed=3, steps=1)
    down, up, *_ = editor.initial_adapter().parameters
    assert not up.any()
    assert torch.equal(down, editor.initial_adapter().parameters[0])
    [change, _] = editor.edit(tiny_requests(1)).changes.values()
    assert isinstance(change, LowRank)
    # A step of Adam moves A by nothing where B is zero.
    torch.testing.assert_close(change.v, down.detach().mT)


def test_a_second_edit_starts_from_the_first() -> None:
    editor = _editor()
    one, two = tiny_requests(2)
    editor.edit(one).apply_(editor.model)
    between = snapshot(editor.model)
    edit = editor.edit(two)
    assert same(editor.model, between)
    alone = _editor().edit(two)
    assert not torch.allclose(edit.dense(NAME), alone.dense(NAME))


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_peft(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    editor = _editor()
    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(MissingDependencyError, match=r"lightning-edit\[peft\]"):
        editor.edit(tiny_requests(1))
    with pytest.raises(ValueError, match="rank"):
        LoRA(rank=0)


@pytest.mark.real
def test_losses_with_pinned_factors(
    goldens: Path, default_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a two-token edit falls as in the reference run, with its pinned A."""
    model, tokenizer = default_model
    editor = LoRA.from_model(model, tokenizer, steps=3, stop_loss=0.0)
    sites = adapter_sites(model)
    adapter = AdapterLayers(model, sites, rank=8, alpha=32.0, seed=0)
    for site, layer in zip(sites, adapter.layers, strict=True):
        a_RI = layer.lora_A["default"].weight
        k = torch.arange(a_RI.numel(), dtype=torch.float64).view_as(a_RI)
        shift = 1.3 * site.layer + (2.1 if "v_proj" in site.name else 0.0)
        a_RI.data.copy_(torch.sin(0.37 * k + shift) / math.sqrt(a_RI.shape[1]))
    monkeypatch.setattr(
        "lightning_edit.modules.fine_tuning.lora.AdapterLayers", lambda *_, **__: adapter
    )
    edit = editor.edit(EditRequest("The capital of France is", "France", "Buenos Aires"))
    before = json.loads((goldens / "ft" / "outputs.json").read_text())
    start = before["FT-M_two_token_L21_10steps"]["target_nll_pre"]
    assert edit.details["losses"][0] == pytest.approx([start, 3.06, 1.37], rel=5e-3)
