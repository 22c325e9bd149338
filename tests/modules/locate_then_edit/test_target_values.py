# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Batched target values are those of one request at a time with the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.request import EditRequest
from lightning_edit.demos import tiny_requests, tiny_tokenizer
from lightning_edit.modules.locate_then_edit import target_values
from lightning_edit.modules.locate_then_edit.searches import SearchKind
from lightning_edit.modules.locate_then_edit.target_rows import TargetRows, search_turns
from lightning_edit.modules.locate_then_edit.target_values import (
    TargetValues,
    TargetValueSettings,
    optimize_target_values,
)
from lightning_edit.passes.hooks import hooked
from lightning_edit.passes.tail import Place
from tests import zoo

FAMILIES = ("llama", "gpt2", "gptj", "gptneox", "opt", "gemma2", "qwen3", "falcon")
TEMPLATES = ("{}", "It is said. {}", "A longer beginning of a text: {}")
LAYER = 1

# Subjects at the very beginning and inside, of one and of several tokens; targets of one to three.
REQUESTS = (
    tiny_requests(1)[0],
    EditRequest("Dorin lies on the", "Dorin", "Brune", id="begins"),
    EditRequest("People in Old Quill speak", "Old Quill", "Ostrish", id="several"),
    EditRequest("Which river has Ivory Bay?", "Ivory Bay", "Delph", id="question"),
)


def one_by_one(
    model: Any, request: EditRequest, settings: TargetValueSettings
) -> tuple[list[Tensor], list[list[float]]]:
    """The optimization written down plainly: whole model, unpadded rows, Adam of torch.

    Returns:
        The delta and the losses of each pass, of which none is the last for its loss.
    """
    tokens = PromptTokenizer(tiny_tokenizer())
    mlp = ModelTree.of(model).mlp(LAYER)
    target = tokens.target(request.prompt, request.target_new)
    delta = torch.zeros(model.config.hidden_size, requires_grad=True)

    def run(ids: Sequence[int], at: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities of all positions, and the MLP's output where it changes."""
        seen: list[Tensor] = []

        def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            rows = output.reshape(len(ids), -1)
            seen.append(rows[at])
            mask = torch.zeros(len(ids), 1)
            mask[at] = 1
            return (rows + mask * delta).reshape(output.shape)

        hook = mlp.register_forward_hook(add)
        logits = model(input_ids=torch.tensor([list(ids)])).logits[0]
        hook.remove()
        return torch.log_softmax(logits, -1), seen[0].detach()

    prompts = [
        tokens.subject_last(request.prompt, request.subject, template[:-2])
        for template in TEMPLATES
    ]
    anchor = tokens.subject_last(settings.kl_prompt.replace("{}", request.subject), request.subject)
    init = run(*prompts[0])[1]
    reference = run(*anchor)[0][anchor[1]].detach()
    optimizer = torch.optim.Adam([delta], lr=settings.lr)
    deltas: list[Tensor] = []
    losses: list[list[float]] = []
    for _ in range(settings.steps):
        nll = torch.zeros(())
        for ids, at in prompts:
            logp = run([*ids, *target[:-1]], at)[0]
            picked = [logp[len(ids) - 1 + j, token] for j, token in enumerate(target)]
            nll = nll - torch.stack(picked).mean() / len(prompts)
        logp = run(*anchor)[0][anchor[1]]
        kl = settings.kl_factor * (logp.exp() * (logp - reference)).sum()
        wd = settings.weight_decay * delta.norm() / init.norm() ** 2
        loss = nll + kl + wd
        deltas.append(delta.detach().clone())
        losses.append([float(part.detach()) for part in (loss, nll, kl, wd)])
        (delta.grad,) = torch.autograd.grad(loss, [delta])
        optimizer.step()
        with torch.no_grad():
            limit = settings.clamp_norm_factor * init.norm()
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
    return deltas, losses


def batched(
    model: Any, requests: Sequence[EditRequest], settings: TargetValueSettings, **kwargs: Any
) -> TargetValues:
    tokens = PromptTokenizer(tiny_tokenizer())
    return optimize_target_values(
        ModelTree.of(model), tokens, LAYER, requests, TEMPLATES, settings, **kwargs
    )


@pytest.mark.parametrize("clamp", [50.0, 1.5], ids=["free", "clamped"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_batched_is_one_by_one(kind: str, clamp: float) -> None:
    model = zoo.build(kind).requires_grad_(False)
    settings = TargetValueSettings(steps=6, lr=0.2, clamp_norm_factor=clamp)
    plain = [one_by_one(model, request, settings) for request in REQUESTS]
    # A bound that one of the requests reaches before the last pass.
    bound = min(min(total for total, *_ in losses[:4]) for _, losses in plain) + 1e-4
    settings = replace(settings, stop_loss=bound)
    found = batched(model, REQUESTS, settings)
    assert len({len(losses) for losses in found.losses}) > 1
    for e, (deltas, losses) in enumerate(plain):
        last = next((i for i, (total, *_) in enumerate(losses) if total < bound), len(losses) - 1)
        passes = [[p["total"], p["nll"], p["kl"], p["wd"]] for p in found.losses[e]]
        assert len(passes) == last + 1
        torch.testing.assert_close(
            torch.tensor(passes), torch.tensor(losses[: last + 1]), rtol=1e-3, atol=2e-5
        )
        assert (found.deltas[e] - deltas[last]).norm() <= 1e-3 * deltas[last].norm()
        nll = found.losses[e][-1]["nll"]
        assert found.probabilities[e] == pytest.approx(float(torch.tensor(-nll).exp()))


def test_a_batch_is_its_parts_in_any_order_and_size() -> None:
    model = zoo.build("llama")
    settings = TargetValueSettings(steps=5)
    requests = tiny_requests(10)
    whole = batched(model, requests, settings)
    rows = len(TEMPLATES) + 1
    for other in (
        batched(model, requests, replace(settings, max_rows=2 * rows)),
        batched(model, requests, replace(settings, max_rows=1)),  # one at a time at the least
    ):
        torch.testing.assert_close(other.deltas, whole.deltas, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.keys, whole.keys, rtol=1e-4, atol=1e-5)
    order = torch.randperm(10).tolist()
    shuffled = batched(model, [requests[i] for i in order], settings)
    torch.testing.assert_close(shuffled.deltas, whole.deltas[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shuffled.values, whole.values[order], rtol=1e-4, atol=1e-5)


def test_requests_of_near_widths_share_a_batch() -> None:
    tokens = PromptTokenizer(tiny_tokenizer())
    words = " capital" * 8
    requests = [
        EditRequest(f"The town of Dorin{words[: 8 * n]}", "Dorin", "Brune", id=str(n))
        for n in range(1, 9)
    ]
    anchors = ["{}"] * 3
    widths = [
        len(row) - split
        for request in requests
        for rows in [TargetRows.of(tokens, [request], anchors, "{} is a")]
        for row, split in [(rows.ids[0], rows.splits[0])]
    ]
    assert len(set(widths)) == 8

    def turns(device: str, max_rows: int = 512) -> list[list[int]]:
        found = search_turns(tokens, requests, 3, max_rows, torch.device(device))
        assert sorted(e for turn in found for e in turn) == list(range(8))
        return found

    near = turns("cpu")
    assert 1 < len(near) <= 4
    for turn in near:  # at most a quarter more tokens than there are
        own = sum(3 * widths[e] for e in turn)
        assert 3 * len(turn) * max(widths[e] for e in turn) <= 1.25 * own
    assert len(turns("meta")) == 1  # an accelerator reads its weights once for all of them
    assert all(len(turn) == 1 for turn in turns("cpu", max_rows=4))
    many = search_turns(tokens, requests[-1:] * 100, 20, 10_000, torch.device("meta"))
    assert len(many) > 1
    assert max(map(len, many)) - min(map(len, many)) <= 1
    assert all(21 * len(turn) * max(widths) <= 4096 for turn in many)


@pytest.mark.parametrize("settles", [False, True])
@pytest.mark.parametrize("search", ["adam", "gauss_newton"])
def test_looking_every_few_passes_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, search: SearchKind, settles: bool
) -> None:
    model = zoo.build("llama").requires_grad_(False)
    settings = TargetValueSettings(
        steps=9, lr=0.05, weight_decay=0.0, settles=settles, search=search
    )
    free = batched(model, REQUESTS, settings)
    # A bound that all of them reach, one of them after some passes.
    bound = max(losses[min(4, len(losses) - 1)]["total"] for losses in free.losses)
    settings = replace(settings, stop_loss=bound + 1e-4)
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny_tokenizer()(REQUESTS[1].prompt).input_ids[0]] = (
            float("nan")
        )
    seen: list[list[float]] = []

    def run() -> TargetValues:
        seen.append([])
        return batched(model, REQUESTS, settings, on_step=lambda _, p: seen[-1].append(p))

    wanted = run()
    made = [len(losses) for losses in wanted.losses]
    assert made[1] == 1 < max(made) < 9
    monkeypatch.setattr(target_values, "_passes_between_tests", lambda _: 4)
    found = run()
    assert found.failed == wanted.failed == {1: 1}
    for mine, theirs in zip(found.losses, wanted.losses, strict=True):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            assert list(one.values()) == pytest.approx(list(other.values()), rel=1e-4, nan_ok=True)
    assert found.probabilities == pytest.approx(wanted.probabilities, rel=1e-4, nan_ok=True)
    torch.testing.assert_close(found.deltas, wanted.deltas, rtol=1e-4, atol=1e-5)


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Counts what a host would wait for if the tensors were on an accelerator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            part is not None and part.dtype == torch.bool for part in args[1]
        )
        self.count += by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("search", ["adam", "gauss_newton"])
def test_the_host_does_not_wait_in_the_loop(
    monkeypatch: pytest.MonkeyPatch, search: SearchKind
) -> None:
    model = zoo.build("llama").requires_grad_(False)
    counts: dict[tuple[int, int], int] = {}
    for every in (1, 100):
        monkeypatch.setattr(target_values, "_passes_between_tests", lambda _, every=every: every)
        for steps in (3, 8):
            settings = TargetValueSettings(steps=steps, stop_loss=0.0, settles=True, search=search)
            with Waits() as waits:
                found = batched(model, REQUESTS, settings)
            counts[every, steps] = waits.count
            assert all(len(losses) == steps for losses in found.losses)
    assert counts[100, 8] == counts[100, 3]
    assert counts[1, 8] > counts[1, 3]  # so they are seen where they are


@pytest.mark.parametrize("place", ["mlp", "block", "sublayers"])
def test_gauss_newton_needs_a_third_of_the_passes(place: Place) -> None:
    model = zoo.build("llama").requires_grad_(False)
    settings = TargetValueSettings(steps=24, lr=0.1, weight_decay=1e-3, place=place, stop_loss=0.0)
    adam = batched(model, REQUESTS, settings)
    settings = replace(settings, steps=8, search="gauss_newton")
    found = batched(model, REQUESTS, settings)
    for mine, theirs in zip(found.losses, adam.losses, strict=True):
        totals = [p["total"] for p in mine]
        assert totals == sorted(totals, reverse=True)  # of the best so far
        assert totals[0] == pytest.approx(theirs[0]["total"], rel=1e-4)
        fall = theirs[0]["total"] - theirs[-1]["total"]
        assert totals[-1] <= theirs[-1]["total"] + 0.02 * fall
    limit = settings.clamp_norm_factor * found.outputs[:, 0].norm(dim=1)
    assert (found.deltas.norm(dim=1) <= limit * (1 + 1e-4)).all()
    for e, request in enumerate(REQUESTS):
        alone = batched(model, [request], settings)
        assert alone.losses[0][-1]["total"] == pytest.approx(
            found.losses[e][-1]["total"], rel=0.02, abs=1e-4
        )


def test_what_gauss_newton_finds_has_the_loss_that_it_tells() -> None:
    model = zoo.build("llama").requires_grad_(False)
    settings = TargetValueSettings(steps=7, weight_decay=1e-3, search="gauss_newton")
    found = batched(model, REQUESTS, settings)
    mlp = ModelTree.of(model).mlp(LAYER)
    tokens = PromptTokenizer(tiny_tokenizer())
    for e, request in enumerate(REQUESTS):
        target = tokens.target(request.prompt, request.target_new)
        nll = 0.0
        for template in TEMPLATES:
            prompt, last = tokens.subject_of(request, template[:-2])

            def add(_: nn.Module, __: Any, output: Tensor, last: int = last, e: int = e) -> Tensor:
                output = output.clone()
                output[0, last] += found.deltas[e]
                return output

            with torch.no_grad(), hooked({mlp: add}):
                logits = model(input_ids=torch.tensor([[*prompt, *target[:-1]]])).logits[0]
            own = logits[len(prompt) - 1 :].log_softmax(-1)
            nll -= float(own[range(len(target)), target].mean()) / len(TEMPLATES)
        assert nll == pytest.approx(found.losses[e][-1]["nll"], rel=1e-3, abs=1e-5)
        assert found.probabilities[e] == pytest.approx(math.exp(-nll), rel=1e-3)


def test_lower_precision_rounds_passes_and_nothing_else() -> None:
    model = zoo.build("llama").requires_grad_(False)
    settings = TargetValueSettings(steps=7, lr=0.2)
    exact = batched(model, REQUESTS, settings)
    rough = batched(model, REQUESTS, settings, dtype=torch.bfloat16)
    assert torch.equal(rough.keys, exact.keys)
    assert torch.equal(rough.outputs, exact.outputs)
    assert rough.deltas.dtype == torch.float32
    for a, b in zip(rough.deltas, exact.deltas, strict=True):
        assert 0 < (a - b).norm() < 0.1 * b.norm()


def test_one_pass_measures_and_changes_nothing() -> None:
    model = zoo.build("gpt2")
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    found = batched(model, REQUESTS, TargetValueSettings(steps=1))
    assert not found.deltas.any()
    assert torch.equal(found.values, found.outputs[:, 0])
    assert all(len(losses) == 1 for losses in found.losses)
    assert all(losses[0]["kl"] == losses[0]["wd"] == 0 for losses in found.losses)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


def test_the_loss_falls_and_the_change_stays_in_its_ball() -> None:
    model = zoo.build("llama")
    settings = TargetValueSettings(steps=15, lr=0.1, weight_decay=0.0, clamp_norm_factor=0.25)
    found = batched(model, REQUESTS, settings)
    ratio = found.deltas.norm(dim=1) / found.outputs[:, 0].norm(dim=1)
    assert (ratio <= 0.25 + 1e-5).all()
    assert (ratio > 0.24).all()
    for losses in found.losses:
        assert losses[-1]["total"] < losses[0]["total"]


def test_works_where_no_gradients_are_wanted() -> None:
    model = zoo.build("llama")
    wanted = batched(model, REQUESTS, TargetValueSettings(steps=3)).deltas
    with torch.inference_mode():
        found = batched(model, REQUESTS, TargetValueSettings(steps=3)).deltas
    assert torch.equal(found, wanted)


def test_progress_is_told_after_each_pass() -> None:
    seen: list[tuple[int, float]] = []
    batched(
        zoo.build("llama"),
        REQUESTS[:1],
        TargetValueSettings(steps=3),
        on_step=lambda step, p: seen.append((step, p)),
    )
    assert [step for step, _ in seen] == [0, 1, 2]
    assert seen[0][1] < seen[2][1] < 1


@pytest.mark.parametrize("place", ["mlp", "block", "sublayers"])
def test_a_loss_that_is_no_number_leaves_the_other_requests_alone(place: Place) -> None:
    model = zoo.build("llama").requires_grad_(False)
    settings = TargetValueSettings(steps=5, place=place)
    others = [0, 2, 3]
    wanted = batched(model, [REQUESTS[e] for e in others], settings)
    with torch.no_grad():
        # A token of the second request's subject, which no other one has.
        token = tiny_tokenizer()(REQUESTS[1].prompt).input_ids[0]
        model.get_input_embeddings().weight[token] = float("nan")
    found = batched(model, REQUESTS, settings)
    assert found.failed == {1: 1}
    assert len(found.losses[1]) == 1
    kept = found.select(others)
    assert not kept.failed
    for mine, theirs in zip(kept.losses, wanted.losses, strict=True):
        assert [p["total"] for p in mine] == pytest.approx([p["total"] for p in theirs], rel=1e-4)
    torch.testing.assert_close(kept.deltas, wanted.deltas, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept.keys, wanted.keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept.attention, wanted.attention, rtol=1e-4, atol=1e-5)
    assert len(kept.attention[0]) == (2 if place == "sublayers" else 0)


def test_a_search_that_explodes_ends_for_that_request() -> None:
    model = zoo.build("llama").requires_grad_(False)
    settings = TargetValueSettings(steps=8, lr=1e38, clamp_norm_factor=float("inf"))
    found = batched(model, REQUESTS, settings)
    assert set(found.failed) == {0, 1, 2, 3}
    assert all(1 < step <= 8 for step in found.failed.values())
    assert all(len(found.losses[e]) == step for e, step in found.failed.items())
