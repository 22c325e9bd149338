# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Pairs in mixtures of experts: keys by gradients, the joint solve by hand, what changes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edit import EMMET, KN, MEMIT, PMET, ROME, RROME, AlphaEdit, Edit, EditRequest
from lightning_edit.core.errors import EditError, LocatorError
from lightning_edit.core.experts import ExpertSite
from lightning_edit.core.locator import ModelTree
from lightning_edit.demos import tiny_requests, tiny_tokenizer
from lightning_edit.functional.least_squares import preserving_update
from lightning_edit.functional.moments import regularize, shrink_to_pool
from lightning_edit.metrics import RoutingSimilarity
from lightning_edit.passes.routing import expert_sets
from tests.families.architectures import ARCHITECTURES, build
from tests.modules.helpers import bare_trainer, fingerprint, same, snapshot

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe")
LAYER = 1

pytestmark = pytest.mark.filterwarnings("ignore:Request .* have a cosine of:UserWarning")


@pytest.fixture(autouse=True)
def _three_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A layer below and one above; and transformers tells of kernels that are not there."""
    for name in FAMILIES:
        kind, sizes = ARCHITECTURES[name]
        monkeypatch.setitem(ARCHITECTURES, name, (kind, {**sizes, "num_hidden_layers": 3}))
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(before)


def site_of(model: nn.Module) -> ExpertSite:
    site = ModelTree.of(model).mlp_site(LAYER)
    assert isinstance(site, ExpertSite)
    return site


def gradient_of(site: ExpertSite, model: nn.Module, outputs: Tensor, mix: Tensor) -> Tensor:
    """The gradient of mixed outputs with respect to all last projections, as [D, E M]."""
    [found] = torch.autograd.grad((outputs * mix).sum(), site.parameter(model))
    return site.matrix(found)


def key_at_subject(model: Any, request: EditRequest) -> Tensor:
    """The stacked key at a subject's last token: how one coordinate of the output moves with W."""
    site, outputs = site_of(model), []

    def take(_: nn.Module, __: object, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    ids, last = editor_of(ROME, model).tokens.subject_of(request)
    hook = site.module(model).register_forward_hook(take)
    model(input_ids=torch.tensor([ids]), use_cache=False)
    hook.remove()
    row = outputs[0].reshape(len(ids), -1)[last]
    return gradient_of(site, model, row[:1], torch.ones(1))[0]


def moments(site: ExpertSite) -> Tensor:
    """Some second moment of each expert, [E, M, M]."""
    roots = torch.randn(site.moment_shape, generator=torch.Generator().manual_seed(1))
    return roots @ roots.mT / site.width + 0.1 * torch.eye(site.width)


def editor_of(method: Any, model: Any, **settings: Any) -> Any:
    settings = {"layers": [LAYER], "context_templates": ["{}"], **settings}
    editor = method.from_model(model, tiny_tokenizer(), **settings)
    editor.set_second_moment(LAYER, moments(site_of(model)))
    return editor


def blockwise(site: ExpertSite, factors: Tensor) -> Tensor:
    whole = torch.zeros(site.in_features, site.in_features, dtype=torch.float64)
    for e, factor in enumerate(factors):
        at = slice(e * site.width, (e + 1) * site.width)
        whole[at, at] = factor
    return whole


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_are_what_gradients_say(name: str) -> None:
    model = build(name)
    site = site_of(model)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(9, site.out_features, generator=generator)
    mix = torch.randn(9, site.out_features, generator=generator)
    output = site.module(model)(states[None])
    output = output[0] if isinstance(output, tuple) else output
    wanted = gradient_of(site, model, output.reshape(9, -1), mix)
    kernel = model.config._experts_implementation
    torch.testing.assert_close(mix.T @ site.keys(model, states), wanted, rtol=1e-4, atol=1e-5)
    assert model.config._experts_implementation == kernel
    assert site.transposed is (name == "gpt_oss")
    picked = [site.picked(key) for key in site.keys(model, states)]
    assert all(len(experts) == 2 for experts in picked)


@pytest.mark.parametrize("name", FAMILIES)
def test_rome_is_the_joint_solve_over_active_experts(name: str) -> None:
    model = build(name)
    [request], before = tiny_requests(1), snapshot(model)
    edit = editor_of(ROME, model).edit(request)
    assert same(model, before)
    # Δ_e = r (C_e⁻¹ g_e k_e)ᵀ / Σ (g_e k_e)ᵀ C_e⁻¹ (g_e k_e), from the gradient's key.
    site, key = site_of(model), key_at_subject(model, request).double()
    solved = torch.linalg.solve(blockwise(site, moments(site)), key)
    residual = edit.details["target_values"].deltas[0].double()
    wanted = torch.outer(residual, solved) / (key @ solved)
    found = site.matrix(edit.dense(site.name))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)
    changed = edit.dense(site.name).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == site.picked(key)
    assert len(changed) == 2
    assert list(edit.changes) == [site.name]


@pytest.mark.parametrize("name", FAMILIES)
def test_memit_is_the_dual_of_the_stacked_ridge_system(name: str, tmp_path: Path) -> None:
    model = build(name)
    requests, before = tiny_requests(3), snapshot(model)
    edit = editor_of(MEMIT, model, moment_weight=0.5).edit(requests)
    site = site_of(model)
    keys = torch.stack([key_at_subject(model, r) for r in requests], 1).double()  # [E M, 3]
    solved = torch.linalg.solve(blockwise(site, moments(site)), keys)
    system = keys.T @ solved + 0.5 * torch.eye(3)
    residuals = edit.details["residuals"][LAYER].T.double()
    wanted = residuals @ torch.linalg.solve(system, solved.T)
    found = site.matrix(edit.dense(site.name))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)
    # Saved, read, applied and taken back as any other edit, to the bit.
    again = Edit.load(edit.save(tmp_path / "edit"))
    again.apply_(model)
    assert torch.equal(model.get_parameter(site.name), before[site.name] + edit.dense(site.name))
    written = fingerprint(model)
    again.revert_(model)
    assert same(model, before)
    edit.apply_(model)
    assert fingerprint(model) == written
    edit.revert_(model)
    assert same(model, before)


def test_a_pair_is_stored_exactly_by_all_active_experts_together() -> None:
    model = build("deepseek_v3")
    [request] = tiny_requests(1)
    site, key = site_of(model), key_at_subject(model, request)
    edit = editor_of(ROME, model).edit(request)
    moved = site.matrix(edit.dense(site.name)) @ key
    torch.testing.assert_close(moved, edit.details["target_values"].deltas[0], rtol=1e-4, atol=1e-5)


def test_experts_that_are_named_alone_change() -> None:
    model = build("qwen3_moe")
    [request] = tiny_requests(1)
    site = site_of(model)
    first, second = site.picked(key_at_subject(model, request))
    others = [e for e in range(site.experts) if e not in (first, second)]
    for method in (ROME, RROME, MEMIT, EMMET, AlphaEdit):
        edit = editor_of(method, model, experts=[first, *others]).edit(request)
        changed = edit.dense(site.name).flatten(1).any(1).nonzero().flatten().tolist()
        assert changed == [first]
    with pytest.raises(EditError, match=rf"sends its subject to the experts \[{first}, {second}"):
        editor_of(ROME, model, experts=others).edit(request)
    with pytest.raises(LocatorError, match=r"`experts` names \[4\], but layer 1 has the experts 0"):
        ROME.from_model(model, tiny_tokenizer(), layers=[LAYER], experts=[4])
    dense = build("deepseek_v3")
    with pytest.raises(LocatorError, match="layer 0 is of one piece"):
        ROME.from_model(dense, tiny_tokenizer(), layers=[0], experts=[1])


@pytest.mark.parametrize("method", [RROME, PMET, EMMET, AlphaEdit])
def test_what_shares_the_solve_edits_experts_too(method: Any) -> None:
    model = build("gpt_oss")
    requests = tiny_requests(1 if method is RROME else 2)
    before, edit = snapshot(model), editor_of(method, model).edit(requests)
    assert same(model, before)
    site = site_of(model)
    active = {e for r in requests for e in site.picked(key_at_subject(model, r))}
    changed = edit.dense(site.name).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == sorted(active)
    for losses in edit.details["target_values"].losses:
        assert losses[-1]["nll"] < losses[0]["nll"]


def test_layers_with_and_without_experts_share_an_edit() -> None:
    model = build("deepseek_v3")
    settings: dict[str, Any] = {"layers": [0, LAYER], "tokens_per_dimension": 2}
    editor = MEMIT.from_model(model, tiny_tokenizer(), context_templates=["{}"], **settings)
    edit = editor.edit(tiny_requests(2))
    assert list(edit.changes) == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.experts.down_proj",
    ]
    assert all(norm > 0 for norm in edit.norms().values())


def test_aligned_batches_one_by_one_are_their_union() -> None:
    requests, deltas = tiny_requests(3), []
    for sizes in ([3], [1, 2]):
        model = build("olmoe")
        editor, rest = editor_of(MEMIT, model, aligned=True, moment_weight=0.5), list(requests)
        for size in sizes:
            editor.commit(editor.edit([rest.pop(0) for _ in range(size)]))
        [name] = editor.delta.changes
        deltas.append(editor.delta.dense(name))
    torch.testing.assert_close(deltas[0], deltas[1], rtol=1e-3, atol=1e-4)


def test_fit_commits_edits_of_experts_and_gives_them_back(tmp_path: Path) -> None:
    model = build("mixtral").bfloat16()
    before, editor = snapshot(model), editor_of(ROME, model)
    from lightning_edit import EditDataModule

    data = EditDataModule(requests=tiny_requests(2), batch_size=1)
    trainer = bare_trainer(max_epochs=1)
    trainer.fit(editor, data)
    assert trainer.global_step == 2
    total = editor.committed()
    [change] = total.changes.values()
    assert change.shape == model.get_parameter(site_of(model).name).shape
    again = Edit.load(total.save(tmp_path / "edit"))
    again.revert_(model)
    assert same(model, before)


def test_an_expert_without_tokens_has_the_moment_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = [torch.randn(n, 3, generator=generator).double() for n in (40, 2, 0)]
    totals = torch.stack([k.T @ k for k in keys])
    counts = torch.tensor([len(k) for k in keys])
    pooled = torch.cat(keys).T @ torch.cat(keys) / 42
    found = regularize(*shrink_to_pool(totals, counts, 3), 0.0).double()
    for e, own in enumerate(keys):
        wanted = (own.T @ own + 3 * pooled) / (len(own) + 3)
        torch.testing.assert_close(found[e], wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[2], pooled, rtol=1e-5, atol=1e-6)
    assert torch.linalg.eigvalsh(found).min() > 0  # two tokens alone have rank two
    with pytest.raises(ValueError, match="there are no keys"):
        shrink_to_pool(totals * 0, counts * 0, 3)


def test_second_moments_are_of_what_each_expert_was_sent(tmp_path: Path) -> None:
    model: Any = build("mixtral")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{r.prompt} {r.target_new}." for r in tiny_requests(24)))
    settings: dict[str, Any] = {"second_moment_text": str(text), "tokens_per_dimension": 1}
    editor = ROME.from_model(
        model, tiny_tokenizer(), layers=[LAYER], ridge=0.0, cache_dir=str(tmp_path), **settings
    )
    found = editor.second_moment(LAYER).double()
    ids = editor.tokens.tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][:64]
    block, sent = model.model.layers[LAYER].mlp, []
    hook = block.register_forward_pre_hook(lambda _, args: sent.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
        hook.remove()
        states = sent[0].reshape(64, -1)
        picked = block.gate(states)[2]
        totals, counts = [], []
        for e in range(4):
            mine = states[(picked == e).any(1)]
            gate, up = (mine @ block.experts.gate_up_proj[e].T).chunk(2, -1)
            keys = (block.experts.act_fn(gate) * up).double()
            totals.append(keys.T @ keys)
            counts.append(len(keys))
    pooled = sum(totals) / sum(counts)
    for e in range(4):
        wanted = (totals[e] + 64 * pooled) / (counts[e] + 64)
        torch.testing.assert_close(found[e], wanted, rtol=1e-3, atol=1e-5)
    file = editor.save_second_moments(tmp_path / "moments.safetensors")
    again = ROME.from_model(model, tiny_tokenizer(), layers=[LAYER], second_moment=str(file))
    assert torch.equal(again.second_moment(LAYER).double(), found)


def test_a_layer_that_cannot_be_told_is_refused_with_the_reason() -> None:
    with pytest.raises(LocatorError, match=r"cannot be edited: no expert is seen to return"):
        ROME.from_model(build("llama4"), tiny_tokenizer(), layers=[1])
    with pytest.raises(LocatorError, match="is a mixture of experts"):
        KN.from_model(build("mixtral"), tiny_tokenizer(), layers=[LAYER])


def routed_by_hand(model: Any, ids: list[int]) -> list[Tensor]:
    """The experts of each token in each layer, [T, E] bool, from Mixtral's own router logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), output_router_logits=True).router_logits
    none = torch.zeros(len(ids), 4, dtype=torch.bool)
    return [none.scatter(1, one.topk(2)[1], True) for one in logits]


def test_routing_similarity_is_of_later_layers_before_and_after() -> None:
    model: Any = build("mixtral")
    tree, requests = ModelTree.of(model), tiny_requests(3)
    editor = ROME.from_model(model, tiny_tokenizer(), layers=[0], context_templates=["{}"])
    rows = [editor.tokens.prompt(request.prompt) for request in requests]
    before = [routed_by_hand(model, row) for row in rows]
    sets = expert_sets(tree, tree.mixtures, rows, 0)
    assert tree.mixtures == [0, 1, 2]
    for one, wanted in zip(sets, before, strict=True):
        assert all(torch.equal(one[layer], wanted[layer]) for layer in tree.mixtures)
    edit = editor.edit(requests)
    metric = RoutingSimilarity()
    with edit.applied(model):
        for row, sent, figures in zip(rows, before, edit.details["requests"], strict=True):
            now, then = (torch.cat(one[1:]) for one in (routed_by_hand(model, row), sent))
            jaccard = (now & then).sum(1) / (now | then).sum(1)
            assert figures["routing_similarity"] == pytest.approx(float(jaccard.mean()), abs=1e-6)
            metric.update(now, then)
    assert metric.count() == 2 * sum(map(len, rows))
    assert 0 < float(metric.compute()) < 1  # an edit this large moves some tokens
    last = ROME.from_model(model, tiny_tokenizer(), layers=[2], context_templates=["{}"])
    assert "routing_similarity" not in last.edit(requests[0]).details["requests"][0]
    with pytest.raises(ValueError, match="one shape"):
        metric.update(before[0][0], before[0][0][:, :2])


def test_the_new_answer_becomes_likelier(subtests: pytest.Subtests) -> None:
    request = tiny_requests(3)[2]
    settings: dict[str, Any] = {"context_templates": ["{}"], "tokens_per_dimension": 8}
    for name in FAMILIES:
        with subtests.test(name):
            editor = ROME.from_model(build(name), tiny_tokenizer(), layers=[LAYER], **settings)
            asked = editor.session.measured([request])[request.id]
            [row] = editor.edit(request).details["requests"]
            assert row["p_target"] > asked["p_target"]


def test_more_pairs_than_inputs_are_solved_over_all_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, residuals = (torch.randn(4, 6, generator=generator) for _ in range(2))
    roots = torch.randn(2, 2, 2, generator=generator).double()
    factors = torch.linalg.cholesky(roots @ roots.mT + torch.eye(2))
    whole = torch.zeros(4, 4, dtype=torch.float64)
    whole[:2, :2], whole[2:, 2:] = factors
    by_blocks = preserving_update(keys, residuals, factors, 0.5)
    at_once = preserving_update(keys, residuals, whole, 0.5)
    torch.testing.assert_close(by_blocks[1], at_once[1])
