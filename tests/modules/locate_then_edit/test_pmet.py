# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""PMET against a plain implementation that runs the whole model, one request at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edit import PMET, EditRequest
from lightning_edit.core.locator import ModelTree
from lightning_edit.demos import tiny_requests, tiny_tokenizer, trained_tiny_model
from tests import zoo
from tests.modules.helpers import same, snapshot
from tests.modules.locate_then_edit.test_mass_edit import (
    GROUPS,
    LAYERS,
    REQUESTS,
    editor_of,
    moment_of,
)
from tests.modules.locate_then_edit.test_mass_edit import plain as plain_keys

FAMILIES = ("llama", "gpt2", "gptj", "gptneox", "opt", "gemma2", "qwen3", "falcon")
LAYER = LAYERS[-1]
SETTINGS: dict[str, Any] = {"steps": 4, "lr": 0.2, "kl_factor": 0.5, "moment_weight": 0.3}


class Plain:
    """The search for both target values written down plainly."""

    def __init__(self, editor: Any, request: EditRequest) -> None:
        self.editor, self.model, self.request = editor, editor.model, request
        tree = ModelTree.of(editor.model)
        self.parts = [
            tree.mlp_out(LAYER).module(editor.model),
            tree.attention_out(LAYER).module(editor.model),
        ]
        width = editor.model.config.hidden_size
        self.deltas = [torch.zeros(width, requires_grad=True) for _ in self.parts]
        self.factors: list[float] = []

    def run(self, ids: Sequence[int], at: int) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities of all positions, and both outputs where they change."""
        seen: list[Tensor] = []

        def adder(delta: Tensor) -> Any:
            def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
                rows = output.reshape(len(ids), -1)
                seen.append(rows[at].detach().clone())
                mask = torch.zeros(len(ids), 1)
                mask[at] = 1
                return (rows + mask * delta).reshape(output.shape)

            return add

        both = list(zip(self.parts, self.deltas, strict=True))
        hooks = [part.register_forward_hook(adder(delta)) for part, delta in both]
        order: list[int] = []
        hooks += [
            part.register_forward_pre_hook(lambda *_, i=i: order.append(i))
            for i, part in enumerate(self.parts)
        ]
        logits = self.model(input_ids=torch.tensor([list(ids)])).logits[0]
        for hook in hooks:
            hook.remove()
        return torch.log_softmax(logits, -1), [seen[order.index(i)] for i in range(2)]

    def search(self) -> tuple[list[Tensor], list[list[float]]]:
        tokens, request, s = self.editor.tokens, self.request, self.editor.settings
        target = tokens.target(request.prompt, request.target_new)
        prompts = [
            tokens.subject_last(request.prompt, request.subject, template[:-2])
            for group in GROUPS
            for template in group
        ]
        anchor = tokens.subject_last(f"{request.subject} is a", request.subject)
        init = self.run(*prompts[0])[1]
        reference = self.run(*anchor)[0][anchor[1]].detach()
        optimizer = torch.optim.Adam(self.deltas, lr=s.lr)
        losses: list[list[float]] = []
        factor = s.nll_factor
        for step in range(s.steps):
            nll, right = torch.zeros(()), True
            for ids, at in prompts:
                logp = self.run([*ids, *target[:-1]], at)[0][len(ids) - 1 :]
                nll = nll - logp[range(len(target)), target].mean() / len(prompts)
                right &= logp.argmax(-1).tolist() == target
            logp = self.run(*anchor)[0][anchor[1]]
            kl = s.kl_factor * (logp.exp() * (logp - reference)).sum()
            sizes = [d.norm() / v.norm() ** 2 for d, v in zip(self.deltas, init, strict=True)]
            wd = s.weight_decay * torch.stack(sizes).sum()
            self.factors.append(factor)
            loss = factor * nll + kl + wd
            losses.append([float(p.detach()) for p in (loss, factor * nll, kl, wd)])
            if loss < s.stop_loss:
                break
            factor = s.nll_factor * (0.1 if right else 1.0)
            if (right and kl <= 0.01) or step == s.steps - 1:
                break
            for d, gradient in zip(
                self.deltas, torch.autograd.grad(loss, self.deltas), strict=True
            ):
                d.grad = gradient
            optimizer.step()
            with torch.no_grad():
                for d, v in zip(self.deltas, init, strict=True):
                    limit = s.clamp_norm_factor * v.norm()
                    if d.norm() > limit:
                        d.mul_(limit / d.norm())
        return [d.detach() for d in self.deltas], losses


@pytest.mark.parametrize("clamp", [50.0, 1.0], ids=["free", "clamped"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_both_deltas_are_those_of_one_request_with_the_whole_model(kind: str, clamp: float) -> None:
    model = zoo.build(kind).requires_grad_(False)
    editor = editor_of(PMET, model, clamp_norm_factor=clamp, **SETTINGS)
    found = editor.edit(REQUESTS).details["target_values"]
    for e, request in enumerate(REQUESTS):
        deltas, losses = Plain(editor, request).search()
        passes = [[p["total"], p["nll"], p["kl"], p["wd"]] for p in found.losses[e]]
        torch.testing.assert_close(torch.tensor(passes), torch.tensor(losses), rtol=1e-3, atol=2e-5)
        assert (found.deltas[e] - deltas[0]).norm() <= 1e-3 * deltas[0].norm()
        assert (found.attention[e, 1] - deltas[1]).norm() <= 1e-3 * deltas[1].norm()
        assert deltas[0].norm() > 0
        assert deltas[1].norm() > 0


def test_a_request_that_is_right_counts_its_answer_less_and_ends() -> None:
    model, _ = trained_tiny_model()
    requests = tiny_requests(5)
    # A weak factor leaves the divergence small when the answer becomes the likeliest.
    settings = {"steps": 20, "lr": 0.05, "kl_factor": 5e-4, "weight_decay": 0.0}
    settings["clamp_norm_factor"] = 4.0
    editor = editor_of(PMET, model, **settings, moment_weight=0.3)
    found = editor.edit(requests).details["target_values"]
    plain = [Plain(editor, request) for request in requests]
    for e, one in enumerate(plain):
        deltas, losses = one.search()
        assert len(found.losses[e]) == len(losses)
        assert found.losses[e][-1]["nll"] == pytest.approx(losses[-1][1], rel=1e-3, abs=1e-5)
        assert (found.deltas[e] - deltas[0]).norm() <= 1e-3 * deltas[0].norm()
    early = [e for e, losses in enumerate(found.losses) if len(losses) < 20]
    assert early
    assert all(found.losses[e][-1]["total"] >= 0.05 for e in early)  # not by the usual bound
    strict = editor_of(PMET, model, **{**settings, "kl_factor": 1e-2}, moment_weight=0.3)
    again = [Plain(strict, request) for request in requests]
    for one in again:
        one.search()
    assert any(0.1 in one.factors for one in again)  # the weaker factor is met, too
    values = strict.edit(requests).details["target_values"]
    for e, one in enumerate(again):
        assert len(values.losses[e]) == len(one.factors)
        for passed, factor in zip(values.losses[e], one.factors, strict=True):
            nll = passed["nll"] / factor
            if passed is values.losses[e][-1]:
                assert values.probabilities[e] == pytest.approx(math.exp(-nll), rel=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_layers_take_their_part_of_what_the_last_mlp_lacks(kind: str) -> None:
    model = zoo.build(kind)
    editor = editor_of(PMET, model, **SETTINGS)
    kept = snapshot(model)
    edit = editor.edit(REQUESTS)
    assert same(model, kept)
    values = edit.details["target_values"].values
    sites = editor.sites(editor.tree)
    last = sites[-1].module(model)
    with torch.no_grad():
        for i, site in enumerate(sites):
            keys = torch.stack([plain_keys(editor, r, site.layer)[0] for r in REQUESTS])
            outputs = []
            for request in REQUESTS:
                ids, at = editor.tokens.subject_last(request.prompt, request.subject)
                seen: list[Tensor] = []

                def keep(_: Any, __: Any, out: Tensor, seen: Any = seen, n: int = len(ids)) -> None:
                    seen.append(out.reshape(n, -1).clone())

                hook = last.register_forward_hook(keep)
                model(input_ids=torch.tensor([ids]))
                hook.remove()
                outputs.append(seen[0][at])
            residuals = (values - torch.stack(outputs)) / math.sqrt(len(sites) - i)
            torch.testing.assert_close(
                edit.details["residuals"][site.layer], residuals, rtol=1e-3, atol=1e-4
            )
            k, r = keys.double().T, residuals.double().T
            moment = moment_of(k.shape[0], site.layer).double()
            wanted = site.orient(r @ k.T @ torch.linalg.inv(0.3 * moment + k @ k.T)).float()
            assert (edit.dense(site.name) - wanted).norm() < 2e-3 * wanted.norm()
            site.parameter(model).add_(wanted)


def test_it_teaches_the_tiny_world() -> None:
    model, tokenizer = trained_tiny_model()
    requests = tiny_requests(4)[1::2]
    editor = PMET.from_model(
        model,
        tokenizer,
        layers=[1],
        steps=25,
        written_share=0.99,
        tokens_per_dimension=8,
        kl_factor=0.0625,
        clamp_norm_factor=4.0,
        context_templates=GROUPS,
    )
    before = editor.evaluator.evaluate(requests).mean("reliability/nll_new")[0]
    with editor.edit(requests).applied(model):
        after = editor.evaluator.evaluate(requests).mean("reliability/nll_new")[0]
    assert after < 0.3 * before


def test_a_factor_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="`nll_factor` is expected to be above 0, but got 0"):
        PMET.from_model(zoo.build("llama"), tiny_tokenizer(), nll_factor=0.0)
