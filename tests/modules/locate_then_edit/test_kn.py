# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Knowledge neurons: which are found, and what becomes of the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_edit import KN, EditRequest, load_model, load_tokenizer
from lightning_edit.core.change import LowRank
from lightning_edit.core.errors import EditError, LocatorError, ModelError, RequestError
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.modules.locate_then_edit.kn import KnowledgeNeurons
from tests.zoo import build

STEPS = 4


def editor_of(**settings: Any) -> KN:
    return KN.from_model(*trained_tiny_model(), **{"steps": STEPS, **settings})


def plain_scores(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Attributions [L, M] of a Llama, token by token, layer by layer, point by point."""
    model.requires_grad_(False)
    scores = []
    for layer in model.model.layers:
        total = torch.zeros(layer.mlp.down_proj.in_features)
        for k, token in enumerate(answer):
            row = torch.tensor([[*prompt, *answer[:k]]])
            kept: list[Tensor] = []
            hook = layer.mlp.down_proj.register_forward_pre_hook(
                lambda _, args, kept=kept: kept.append(args[0][0, -1].clone())
            )
            model(input_ids=row)
            hook.remove()
            for step in range(STEPS):
                scaled = (step / (STEPS - 1) * kept[0]).requires_grad_()
                hook = layer.mlp.down_proj.register_forward_pre_hook(
                    lambda _, args, scaled=scaled: torch.cat(
                        [args[0][:, :-1], scaled[None, None]], 1
                    )
                )
                logits = model(input_ids=row).logits[0, -1]
                hook.remove()
                [gradient] = torch.autograd.grad(logits.softmax(-1)[token], scaled)
                total += kept[0] * gradient / STEPS / len(answer)
        scores.append(total)
    return torch.stack(scores)


def activations_of(found: KnowledgeNeurons) -> dict[tuple[int, int], float]:
    """Activation of each neuron, by its layer and index."""
    places = zip(found.layers.tolist(), found.indices.tolist(), strict=True)
    return dict(zip(places, found.activations.tolist(), strict=True))


# -- finding -----------------------------------------------------------------------------------


def test_neurons_are_those_of_the_plain_computation() -> None:
    editor = editor_of()
    request = tiny_requests(2)[1]  # its old answer has several tokens
    found = editor.find(request)
    tokenizer = editor.tokens.tokenizer
    answer = tokenizer(f" {request.target_old}").input_ids
    assert len(answer) > 1
    assert found.answer == tuple(answer)
    model, _ = trained_tiny_model()
    scores = plain_scores(model, tokenizer(request.prompt).input_ids, answer)
    torch.testing.assert_close(found.attributions[0], scores, rtol=1e-3, atol=1e-6)
    wanted = torch.nonzero(scores > 0.2 * scores.max())
    assert 0 < len(wanted) < 100
    assert set(activations_of(found)) == {(int(layer), int(i)) for layer, i in wanted}
    torch.testing.assert_close(found.scores, scores[found.layers, found.indices], rtol=1e-3, atol=0)


def test_without_an_old_answer_it_is_the_models_own() -> None:
    editor = editor_of()
    request = tiny_requests(1)[0]
    [first, *rest] = editor.tokens.tokenizer(f" {request.target_old}").input_ids
    own = editor.find(replace(request, target_old=None))
    assert own.answer == (first,)
    if not rest:
        assert torch.equal(own.attributions, editor.find(request).attributions)


def test_refinement_counts_prompts() -> None:
    request = tiny_requests(1)[0]
    assert len(request.rephrases) == 2
    alone = [
        editor_of().find(replace(request, prompt=prompt))
        for prompt in (request.prompt, *request.rephrases)
    ]
    sets = [set(activations_of(found)) for found in alone]
    wanted = {pair for pair in set.union(*sets) if sum(pair in one for one in sets) >= 2}
    assert wanted
    assert wanted != sets[0]
    found = editor_of(refine_prompts="rephrases").find(request)
    assert set(activations_of(found)) == wanted
    assert found.attributions.shape[0] == 3
    # Scores and signs are those of the request's own prompt.
    torch.testing.assert_close(found.scores, found.attributions[0][found.layers, found.indices])
    own, here = activations_of(alone[0]), activations_of(found)
    shared = own.keys() & here.keys()
    assert shared
    assert all(here[place] == pytest.approx(own[place], rel=1e-5) for place in shared)
    listed = [prompt.replace(request.subject, "{}") for prompt in request.rephrases]
    same = editor_of(refine_prompts=listed).find(replace(request, rephrases=()))
    assert set(activations_of(same)) == wanted
    every = editor_of(refine_prompts=listed, refine_share=0.9).find(request)
    assert set(activations_of(every)) == set.intersection(*sets)


def test_thresholds_and_layers_can_be_set() -> None:
    request = tiny_requests(1)[0]
    whole = editor_of().find(request).attributions[0]
    top = float(whole.max())
    found = editor_of(threshold=0.5 * top, threshold_kind="absolute").find(request)
    assert len(found) == int((whole > 0.5 * top).sum())
    found = editor_of(threshold=99.0, threshold_kind="percentile").find(request)
    assert len(found) == int((whole > whole.flatten().quantile(0.99)).sum())
    found = editor_of(layers=[-1, 1]).find(request)
    torch.testing.assert_close(found.attributions[0], whole[[1, 3]], rtol=1e-4, atol=1e-7)
    assert set(found.layers.tolist()) <= {1, 3}


def test_finding_changes_nothing_and_tells_the_same_twice() -> None:
    editor = editor_of()
    kept = {name: p.detach().clone() for name, p in editor.model.named_parameters()}
    one = editor.find(tiny_requests(1)[0])
    with torch.inference_mode():
        other = editor.find(tiny_requests(1)[0])
    assert torch.equal(one.attributions, other.attributions)
    assert all(torch.equal(p, kept[n]) for n, p in editor.model.named_parameters())


@pytest.mark.parametrize("kind", ["t5", "flan_t5", "bart"])
def test_of_an_encoder_decoder_the_decoder_is_meant(kind: str) -> None:
    editor = KN.from_model(build(kind), tiny_tokenizer(), steps=STEPS)
    request = tiny_requests(1)[0]
    edit = editor.edit(request)
    assert edit.changes
    assert all(name.split(".")[0] == "decoder" or ".decoder." in name for name in edit.changes)
    # The end token is nobody's knowledge.
    [found] = edit.details["neurons"]
    assert editor.tokens.eos_id not in found.answer
    row = edit.details["requests"][0]
    assert 0 < row["p_target"] < 1


# -- changing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_columns_change_by_the_embeddings(signed: bool) -> None:
    editor = editor_of(signed=signed, factor=1.5)
    request = tiny_requests(1)[0]
    edit = editor.edit(request)
    [found] = edit.details["neurons"]
    assert (found.activations < 0).any()
    assert (found.activations > 0).any()
    tokenizer, model = editor.tokens.tokenizer, editor.model
    old, new = (tokenizer(f" {a}").input_ids[0] for a in (request.target_old, request.target_new))
    step = 1.5 * (model.lm_head.weight[new] - model.lm_head.weight[old]).detach()
    wanted = [torch.zeros_like(layer.mlp.down_proj.weight) for layer in model.model.layers]
    for layer, i, activation in zip(found.layers, found.indices, found.activations, strict=True):
        wanted[int(layer)][:, int(i)] = step * (activation.sign() if signed else 1)
    for i, change in enumerate(wanted):
        name = f"model.layers.{i}.mlp.down_proj.weight"
        assert (name in edit.changes) == bool(change.any())
        if name in edit.changes:
            torch.testing.assert_close(edit.dense(name), change)
            low_rank = edit.changes[name]
            assert isinstance(low_rank, LowRank)
            assert low_rank.rank == 1
    row = edit.details["requests"][0]
    assert row["norm"] == pytest.approx(edit.norm(), rel=1e-5)
    assert row["neurons"] == len(found)
    assert row["steps"] == STEPS


@pytest.mark.parametrize("signed", [True, False])
def test_the_sign_moves_the_output_towards_the_new_answer(signed: bool) -> None:
    editor = editor_of(signed=signed, layers=[-1])
    request = tiny_requests(1)[0]
    edit = editor.edit(request)
    activations = edit.details["neurons"][0].activations
    assert (activations < 0).any()
    tokens, model = editor.tokens, editor.model
    outputs: list[Tensor] = []
    hook = model.model.layers[-1].mlp.register_forward_hook(
        lambda _, __, output: outputs.append(output[0, -1].detach())
    )
    row = torch.tensor([tokens.prompt(request.prompt)])
    model(input_ids=row)
    with edit.applied(model):
        model(input_ids=row)
    hook.remove()
    [old, new] = [
        model.lm_head.weight[tokens.tokenizer(f" {answer}").input_ids[0]].detach()
        for answer in (request.target_old, request.target_new)
    ]
    length = activations.abs().sum() if signed else activations.sum()
    wanted = 2 * length * (new - old)
    torch.testing.assert_close(outputs[1] - outputs[0], wanted, rtol=1e-3, atol=1e-5)


def test_the_first_token_that_differs_is_replaced() -> None:
    editor = editor_of()
    tokenizer = editor.tokens.tokenizer
    old, new = "Ostra bay", "Ostra day"
    a, b = tokenizer(f" {old}").input_ids, tokenizer(f" {new}").input_ids
    place = next(k for k in range(len(a)) if a[k] != b[k])
    assert place > 0
    request = EditRequest("The capital of Velmora is", "Velmora", new, old)
    edit = editor.edit(request)
    head = editor.model.lm_head.weight.detach()
    direction = head[b[place]] - head[a[place]]
    for name in edit.changes:
        u = edit.changes[name].u[:, 0]  # type: ignore[union-attr]
        torch.testing.assert_close(u, direction)


@pytest.mark.parametrize("operation", ["erase", "suppress", "enhance"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_columns_are_scaled(operation: Any, kind: Any) -> None:
    model = tiny_model(kind)
    editor = KN.from_model(
        model, tiny_tokenizer(), steps=STEPS, operation=operation, threshold=0.05
    )
    requests = tiny_requests(2)
    edit = editor.edit(requests)
    found = edit.details["neurons"]
    both = set(activations_of(found[0])) | set(activations_of(found[1]))
    assert len(both) < len(found[0]) + len(found[1])  # what is shared is scaled once
    before = {site.layer: site.read(model).clone() for site in editor.sites(editor.tree)}
    with edit.applied(model):
        for site in editor.sites(editor.tree):
            factors = torch.ones(site.in_features)
            chosen = [i for layer, i in both if layer == site.layer]
            factors[chosen] = 2.0 if operation == "enhance" else 0.0
            torch.testing.assert_close(site.read(model), before[site.layer] * factors)
    assert edit.details["requests"][0]["norm"] > 0


def test_many_columns_are_kept_as_a_matrix() -> None:
    editor = editor_of(operation="erase", threshold=10.0, threshold_kind="percentile", layers=[0])
    edit = editor.edit(tiny_requests(1)[0])
    [change] = edit.changes.values()
    assert isinstance(change, Tensor)
    weight = editor.model.model.layers[0].mlp.down_proj.weight
    erased = edit.details["neurons"][0].indices
    torch.testing.assert_close(change[:, erased], -weight[:, erased])
    assert edit.details["requests"][0]["norm"] == pytest.approx(edit.norm(), rel=1e-5)


def test_requests_of_a_batch_are_found_before_any_is_changed() -> None:
    editor = editor_of()
    requests = tiny_requests(3)
    together = editor.edit(requests)
    apart = [editor.edit(request) for request in requests]
    whole = apart[0] + apart[1] + apart[2]
    assert set(together.changes) == set(whole.changes)
    for name in together.changes:
        torch.testing.assert_close(together.dense(name), whole.dense(name))


def test_embeddings_may_be_those_of_the_input() -> None:
    model, tokenizer = trained_tiny_model()
    assert model.get_output_embeddings() is not model.get_input_embeddings()
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1.0)
    request = tiny_requests(1)[0]
    old, new = (tokenizer(f" {a}").input_ids[0] for a in (request.target_old, request.target_new))
    for embeddings, weight in (
        ("input", model.model.embed_tokens.weight),
        ("output", model.lm_head.weight),
    ):
        edit = KN.from_model(model, tokenizer, steps=STEPS, embeddings=embeddings).edit(request)
        name = next(iter(edit.changes))
        torch.testing.assert_close(
            edit.changes[name].u[:, 0],  # type: ignore[union-attr]
            (weight[new] - weight[old]).detach(),
        )


# -- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operation": "forget"}, r"`operation` is expected to be one of replace, erase"),
        ({"threshold_kind": "share"}, r"`threshold_kind` is expected to be one of adaptive"),
        ({"embeddings": "tied"}, r"`embeddings` is expected to be one of output, input"),
        ({"steps": 0}, r"`steps` is expected to be at least 1"),
        ({"threshold": 1.0}, r"`threshold` is expected to be at least 0 and below 1 "),
        ({"threshold": -0.1}, r"`threshold` is expected to be at least 0"),
        ({"threshold": 100.0, "threshold_kind": "percentile"}, r"below 100 where"),
        ({"refine_share": 1.0}, r"`refine_share` is expected"),
        ({"factor": 0.0}, r"`factor` is expected to be above 0"),
        ({"refine_prompts": "all"}, r"one of rephrases or list\[str\] or null, but got 'all'"),
        ({"refine_prompts": ["The capital is"]}, r"'The capital is' is expected to hold \{\}"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_that_make_no_sense_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KN(**settings)


def test_a_model_is_needed_to_find_anything() -> None:
    with pytest.raises(ModelError, match="not loaded yet"):
        KN().find(tiny_requests(1)[0])


def test_a_layer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(LocatorError, match="Layer 9 does not exist"):
        editor_of(layers=[9])


def test_nothing_to_replace_is_told() -> None:
    editor = editor_of()
    request = tiny_requests(1)[0]
    same = replace(request, target_new=str(request.target_old), target_old=None)
    with pytest.raises(RequestError, match=r"what the model answers, .* begins like `target_new`"):
        editor.edit(same)
    longer = replace(request, target_new=f"{request.target_old} town")
    with pytest.raises(RequestError, match="nothing to replace, since `target_old`"):
        editor.edit(longer)
    # Other operations do not look at the new answer.
    assert editor_of(operation="erase").edit(same).norm() > 0


def test_no_neuron_found_is_told_with_the_threshold() -> None:
    request = tiny_requests(1)[0]
    with pytest.raises(EditError, match=r"above the absolute threshold 50 \(the largest .* Lower"):
        editor_of(threshold=50.0, threshold_kind="absolute").edit(request)
    strict = editor_of(threshold=0.99, refine_prompts=["{} is a", "I like {}"], refine_share=0.9)
    with pytest.raises(EditError, match=r"in more than 0.9 of its 3 prompts .* or `refine_share`"):
        strict.edit(request)


# -- the default model ---------------------------------------------------------------------------


@pytest.mark.real
def test_the_capital_of_france() -> None:
    """Counts and probabilities of an independent implementation with whole rows."""
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    request = EditRequest("The capital of {} is", "France", "Rome", "Paris")
    edit = KN.from_model(model, tokenizer).edit(request)
    [found] = edit.details["neurons"]
    assert len(found) == 14
    assert int((found.activations < 0).sum()) == 7
    assert edit.details["requests"][0]["p_target"] > 0.99
    literal = KN.from_model(model, tokenizer, signed=False).edit(request)
    assert literal.details["requests"][0]["p_target"] < 1e-10
