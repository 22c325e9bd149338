# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""UltraEdit against a plain derivation, one unpadded request at a time with all gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edit import EditRequest, UltraEdit, WeightDelta
from lightning_edit.core.change import LowRank
from lightning_edit.core.errors import EditError, LocatorError
from lightning_edit.core.locator import ModelTree
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, tiny_tokenizer, trained_tiny_model
from tests import zoo
from tests.modules.helpers import autoregressive, bare_trainer, computed, plain_nll, snapshot

EPS = torch.finfo(torch.float32).eps
FAMILIES = ("llama", "gpt2", "gptneox", "opt", "falcon", "gemma2", "t5", "bart")


def editor_of(model: Any, **settings: Any) -> UltraEdit:
    """An editor of a single projection a layer."""
    settings = {"modules": ["mlp_out"], "lr": 1e-4, **settings}
    return UltraEdit.from_model(model, tiny_tokenizer(), **settings)


def plain_taken(editor: UltraEdit, request: EditRequest) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and gradients at the target's positions: Σ loss of one unpadded row."""
    sites = editor.sites(editor.tree)
    prompt = editor.tokens.prompt(request.prompt)
    target = editor.tokens.target(request.prompt, request.target_new)
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for site in sites:

        def record(_: nn.Module, args: Any, output: Tensor, name: str = site.name) -> Tensor:
            output.requires_grad_(True)
            output.retain_grad()
            seen[name] = [args[0].detach(), output]
            return output.clone()

        handles.append(site.module(editor.model).register_forward_hook(record))
    torch.stack(plain_nll(editor.model, prompt, target)).sum().backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    editor.model.zero_grad()
    first = 0 if editor.tree.is_encoder_decoder else len(prompt) - 1
    places = slice(first, first + len(target))
    taken = {}
    for site in sites:
        inputs, output = seen[site.name]
        assert output.grad is not None
        taken[site.name] = (
            inputs.reshape(-1, site.in_features)[places],
            output.grad.reshape(-1, site.out_features)[places],
        )
    return taken


def plain_edit(
    editor: UltraEdit, requests: list[EditRequest], seen: dict[str, list[Tensor]]
) -> dict[str, Tensor]:
    """ΔW of requests that make one pass; ``seen`` are the normalizers' rows of all edits so far."""
    taken = [plain_taken(editor, request) for request in requests]
    total = sum(len(part[editor.sites(editor.tree)[0].name][0]) for part in taken)
    joined = {}
    for site in editor.sites(editor.tree):
        keys = torch.cat([part[site.name][0] for part in taken])
        gradients = torch.cat([part[site.name][1] for part in taken]) / total
        joined[site.name] = keys, gradients
        shape = f"{site.out_features}x{site.in_features}"
        seen.setdefault(shape, []).append(torch.cat([keys, gradients], 1))
    changes = {}
    for site in editor.sites(editor.tree):
        rows = torch.cat(seen[f"{site.out_features}x{site.in_features}"]).double()
        mean, std = rows.mean(0), rows.std(0)
        keys, gradients = (part.double() for part in joined[site.name])
        m = site.in_features
        h = (keys - mean[:m]) / (std[:m] + EPS)
        g = (gradients - mean[m:]) / (std[m:] + EPS)
        values = -editor.lr * h.square().sum(1, keepdim=True) * g
        system = keys.T @ keys + editor.ridge * torch.eye(m).double()
        changes[site.name] = site.orient(torch.linalg.solve(system, keys.T @ values).T).float()
    return changes


def assert_close(edit: WeightDelta, wanted: dict[str, Tensor], tolerance: float = 2e-3) -> None:
    assert set(edit.changes) == set(wanted)
    for name, change in wanted.items():
        difference = (edit.dense(name) - change).norm() / change.norm()
        assert float(difference) < tolerance, (name, float(difference))


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_edit_is_the_plain_formula_on_any_architecture(kind: str) -> None:
    editor = editor_of(zoo.build(kind), layers=[1, 2], modules=["mlp_in", "mlp_out"])
    requests = tiny_requests(4)
    edit = editor.edit(requests)
    assert_close(edit, plain_edit(editor, requests, {}))


def test_the_normalizer_goes_on_from_committed_edits() -> None:
    editor = editor_of(zoo.build("llama"), layers=[1, 2])
    seen: dict[str, list[Tensor]] = {}
    for start in (0, 3, 6):
        requests = tiny_requests(9)[start : start + 3]
        editor.edit(tiny_requests(9)[:2])  # not committed, so it is not seen
        edit = editor.edit(requests)
        assert_close(edit, plain_edit(editor, requests, seen))
        editor.edit_optimizer.stage(edit)
        editor.edit_optimizer.step()
    [passes] = seen.values()
    rows = torch.cat(passes)
    assert int(editor.carried["normalizer.32x64.total"]) == len(rows)
    torch.testing.assert_close(
        editor.carried["normalizer.32x64.mean"], rows.double().mean(0), atol=1e-5, rtol=1e-4
    )


def test_passes_change_no_figure() -> None:
    editor = editor_of(zoo.build("llama"), layers=[1])
    requests = tiny_requests(5)
    whole = editor.edit(requests).details
    editor.micro_batch_size = 2
    split = editor.edit(requests).details
    for figure in ("keys", "gradients"):
        for name, wanted in whole[figure].items():
            torch.testing.assert_close(split[figure][name], wanted, atol=1e-5, rtol=1e-4)
    losses = [[row["searched_loss"] for row in details["requests"]] for details in (whole, split)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_tokens_stand_in_the_order_of_the_requests() -> None:
    editor = editor_of(zoo.build("llama"), layers=[1], micro_batch_size=2)
    requests = tiny_requests(5)
    details = editor.edit(requests).details
    [(name, keys)] = details["keys"].items()
    wanted = torch.cat([plain_taken(editor, request)[name][0] for request in requests])
    torch.testing.assert_close(keys, wanted, atol=1e-4, rtol=1e-3)


def test_the_details_hold_every_figure_on_the_way() -> None:
    editor = editor_of(zoo.build("gpt2"), layers=[1])
    edit = editor.edit(tiny_requests(3))
    [name] = edit.changes
    details: dict[str, Any] = {**edit.details}
    figures = {key: value[name] for key, value in details.items() if key != "requests"}
    inputs, outputs = figures["normalized_keys"], figures["normalized_gradients"]
    rows = torch.cat([figures["keys"], figures["gradients"]], 1)
    wanted = (rows - rows.mean(0)) / rows.std(0)
    torch.testing.assert_close(torch.cat([inputs, outputs], 1), wanted, atol=1e-3, rtol=1e-2)
    values = -editor.lr * inputs.norm(dim=1, keepdim=True) ** 2 * outputs
    torch.testing.assert_close(figures["values"], values)


def test_the_form_is_the_smaller_one() -> None:
    editor = editor_of(zoo.build("llama"), layers=[1])
    few, many = editor.edit(tiny_requests(2)), editor.edit(tiny_requests(12))
    [name] = few.changes
    assert isinstance(few.changes[name], LowRank)
    assert isinstance(many.changes[name], Tensor)
    assert many.dense(name).shape == editor.model.get_parameter(name).shape


def test_no_weight_ever_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = editor_of(zoo.build("llama"), layers=[1, 2], modules=["mlp_in", "mlp_out"])
    asked: list[bool] = []
    grad = torch.autograd.grad

    def watched(outputs: Any, inputs: Any, **settings: Any) -> Any:
        asked.extend(p.requires_grad for p in editor.model.parameters())
        assert len(inputs) == 6
        return grad(outputs, inputs, **settings)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    editor.edit(tiny_requests(3))
    assert asked
    assert not any(asked)
    assert all(p.requires_grad for p in editor.model.parameters())


def test_projections_are_chosen_by_kind_name_and_layer() -> None:
    model = zoo.build("llama")

    def names(**settings: Any) -> list[str]:
        editor = editor_of(model, **settings)
        return [n.removeprefix("model.layers.") for n in editor.edited_names(editor.tree)]

    gate, up, down = (f"mlp.{n}_proj.weight" for n in ("gate", "up", "down"))
    assert names(layers=[1]) == [f"1.{down}"]
    assert names(layers=[1], modules=None) == [f"1.{gate}", f"1.{up}"]
    assert names(layers=[-1], modules=["up_proj", "mlp_in"]) == [f"2.{gate}", f"2.{up}"]
    by_layer = {"up_proj": [2, 1], "gate_proj": [0], "attention_out": [0]}
    assert names(modules=by_layer) == [
        "0.self_attn.o_proj.weight",
        f"0.{gate}",
        f"1.{up}",
        f"2.{up}",
    ]
    with pytest.raises(LocatorError, match="names 'fc_out', which layer 1 of LlamaForCausalLM"):
        names(layers=[1], modules=["fc_out"])
    with pytest.raises(LocatorError, match="name no projection"):
        names(modules=[])
    with pytest.raises(ValueError, match="`modules` gives each projection its layers"):
        names(layers=[1], modules=by_layer)


def test_the_default_layers_are_in_the_upper_part() -> None:
    class Tree:
        def __init__(self, count: int) -> None:
            self.blocks = [None] * count

    def layers(count: int) -> list[int]:
        editor: Any = UltraEdit()
        return list(editor.default_layers(Tree(count)))

    assert layers(28) == list(range(20, 27))
    assert layers(30) == list(range(22, 29))
    assert layers(4) == [2, 3]
    assert layers(1) == [0]


@pytest.mark.parametrize(
    "setting", [{"lr": 0.0}, {"ridge": -1.0}, {"eps": 0.0}, {"micro_batch_size": 0}]
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    [name] = setting
    with pytest.raises(ValueError, match=f"`{name}` is expected to be"):
        UltraEdit(**setting)


def lone_token(editor: UltraEdit) -> EditRequest:
    """A request whose target is one token."""
    for request in tiny_requests(24):
        if len(editor.tokens.target(request.prompt, request.target_new)) == 1:
            return request
    raise AssertionError


def test_what_has_no_statistics_is_refused_and_the_model_left_alone() -> None:
    editor = editor_of(zoo.build("llama"), layers=[1])
    kept = snapshot(editor.model)
    request = lone_token(editor)
    with pytest.raises(EditError, match="a single target token in a single projection"):
        editor.edit(request)
    editor.biased_variance = True
    with pytest.raises(EditError, match="has no variance, as `biased_variance`"):
        editor.edit(request)
    assert all(torch.equal(p, kept[n]) for n, p in editor.model.named_parameters())
    # Two projections of a shape share what they have seen.
    assert editor_of(zoo.build("llama"), layers=[1, 2]).edit(request).norm() > 0


def test_the_biased_form_takes_larger_deviations() -> None:
    def details(*, biased_variance: bool) -> dict[str, Tensor]:
        editor = editor_of(
            zoo.build("llama"), layers=[1], micro_batch_size=2, biased_variance=biased_variance
        )
        return editor.edit(tiny_requests(6)).carried

    exact, biased = details(biased_variance=False), details(biased_variance=True)
    for name in ("total", "mean"):
        assert torch.equal(exact[f"normalizer.32x64.{name}"], biased[f"normalizer.32x64.{name}"])
    assert bool((biased["normalizer.32x64.squares"] > exact["normalizer.32x64.squares"]).all())


def test_it_teaches_the_tiny_world_what_it_is_told() -> None:
    model, tokenizer = trained_tiny_model()
    requests = [request for request in tiny_requests(24) if " " not in request.target_new][:6]
    editor = UltraEdit.from_model(
        model,
        tokenizer,
        lr=3e-3,
        modules=["mlp_in", "mlp_out"],
        max_new_tokens=6,
        repeat_requests=True,
    )
    assert autoregressive(editor, requests, "reliability") == 0.0
    trainer = bare_trainer(max_epochs=8)
    trainer.fit(editor, datamodule=EditDataModule(requests=requests, batch_size=6))
    assert autoregressive(editor, requests, "reliability") == 1.0
    assert [row["id"] for row in editor.history[-6:]] == [request.id for request in requests]


@pytest.mark.parametrize("kind", FAMILIES)
def test_probabilities_are_those_of_the_edited_model_though_not_all_of_it_is_run(kind: str) -> None:
    model = zoo.build(kind)
    editor = editor_of(model, layers=[2], micro_batch_size=2, lr=1e-2)
    requests = tiny_requests(3)
    edit = editor.edit(requests)
    assert not any("forward" in vars(module) for module in model.modules())
    tokens = editor.tokens
    with edit.applied(model), torch.no_grad():
        for row, request in zip(edit.details["requests"], requests, strict=True):
            target = tokens.target(request.prompt, request.target_new)
            nll = torch.stack(plain_nll(model, tokens.prompt(request.prompt), target))
            assert row["p_target"] == pytest.approx(float(torch.exp(-nll.mean())), rel=1e-3)


def test_a_batch_is_run_once() -> None:
    model = zoo.build("llama")
    runs = dict.fromkeys(range(3), 0)
    for layer in runs:

        def count(*_: Any, layer: int = layer) -> None:
            runs[layer] += 1

        ModelTree.of(model).mlp(layer).register_forward_hook(count)
    computed(editor_of(model, layers=[1]), tiny_requests(3))
    assert runs == {0: 1, 1: 1, 2: 1}
