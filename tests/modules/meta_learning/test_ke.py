# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""KE against a plain derivation: dense gates, gradients of weights, one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_edit import KE, EditDataModule, EditRequest
from lightning_edit.core.change import LowRank
from lightning_edit.core.errors import EditError
from lightning_edit.core.processes import Processes
from lightning_edit.data import HeldOut
from lightning_edit.demos import tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.functional.ke import ke_factors
from tests import zoo
from tests.modules.helpers import bare_trainer
from tests.modules.meta_learning.test_mend import PlainMEND

FAMILIES = ("llama", "gpt2", "falcon", "t5", "bart")


def test_factors_are_those_of_the_dense_gate() -> None:
    inputs, gradients, code = torch.randn(4, 3), torch.randn(4, 5), torch.randn(17)
    u, v = ke_factors(inputs, gradients, code, 0.7)
    gamma_a, alpha_a, gamma_b, alpha_b, eta = torch.split(code, [3, 5, 3, 5, 1])
    gate = torch.outer(alpha_a.softmax(0), gamma_a)
    added = torch.outer(alpha_b.softmax(0), gamma_b)
    wanted = 0.7 * eta.sigmoid() * ((gradients.T @ inputs) * gate + added)
    torch.testing.assert_close(u.T @ v, wanted)
    assert u.shape == (5, 5)
    with pytest.raises(ValueError, match=r"shape \[17\].*got \[16\]"):
        ke_factors(inputs, gradients, code[1:])


class PlainKE(PlainMEND):
    """KE of one request."""

    def shift(self, request: EditRequest) -> dict[str, Tensor]:
        editor: Any = self.editor
        network = editor.network
        text = f"{request.target_old} >> {request.target_new} || {request.prompt}"
        ids = torch.tensor(self.tokens.tokenizer(text)["input_ids"][:32])
        embedded = self.model.get_input_embeddings().weight[ids].detach()
        states, _ = network.lstm(embedded[None])
        half = states.shape[2] // 2
        read = torch.cat([states[0, -1, :half], states[0, 0, half:]])
        condition = torch.tanh(network.condition.weight @ read + network.condition.bias)
        factors = self.factors(request)
        found = {}
        for site, head in zip(editor.sites, network.heads, strict=True):
            sizes = [site.in_features, site.out_features] * 2 + [1]
            parts = torch.split(head(condition[None])[0], sizes)
            u, d = factors[site.name]
            gate = torch.outer(parts[1].softmax(0), parts[0])
            added = torch.outer(parts[3].softmax(0), parts[2])
            scale = editor.max_scale * torch.sigmoid(parts[4])
            found[site.name] = scale * ((d.T @ u) * gate + added)
        return found

    def terms(self, request: EditRequest) -> tuple[Tensor, Tensor]:
        weights = self.patched(self.shift(request))
        losses, kl = [], []
        for prompt in (request.prompt, request.rephrases[0]):
            target = torch.tensor(self.tokens.target(prompt, request.target_new))
            logits = self.answers(self.logits(weights, prompt, request.target_new), prompt)
            rest = 0.1 / (logits.shape[1] - 1)
            log_p = logits.log_softmax(-1)
            nll = -log_p[range(len(target)), target]
            losses.append((1 - 0.1 - rest) * nll - rest * log_p.sum(-1))
        probe = request.locality[0]
        pair = probe.prompt, probe.answer
        after = self.answers(self.logits(weights, *pair), probe.prompt).log_softmax(-1)
        before = self.answers(self.logits({}, *pair), probe.prompt).log_softmax(-1).detach()
        kl.append((before.exp() * (before - after)).sum(-1))
        return torch.cat(losses).mean(), torch.cat(kl).mean()

    def answers(self, logits: Tensor, prompt: str) -> Tensor:
        if self.model.config.is_encoder_decoder:
            return logits
        return logits[len(self.tokens.prompt(prompt)) - 1 : -1]


@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_and_gradients_are_those_of_the_plain_form(kind: str) -> None:
    model = zoo.build(kind)
    settings: dict[str, Any] = {"layers": [1, 2], "hidden": 6, "condition": 10, "max_scale": 5.0}
    editor = KE.from_model(model, tiny_tokenizer(), margin=0.25, **settings)
    with torch.no_grad():
        editor.network.multiplier.fill_(0.7)
    requests = tiny_requests(2)
    plain = PlainKE(editor)  # type: ignore[arg-type]
    terms = [plain.terms(request) for request in requests]
    edit, kl = (torch.stack(part).mean() for part in zip(*terms, strict=True))
    wanted = edit + editor.network.multiplier * (kl - 0.25)
    wanted_gradients = torch.autograd.grad(wanted, list(editor.network.parameters()))
    loss, figures = editor.edit_loss(requests, Processes())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert figures["kl"] == pytest.approx(kl.item(), rel=1e-3, abs=1e-6)
    found = torch.autograd.grad(loss, list(editor.network.parameters()))
    for a, b in zip(found, wanted_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=1e-3 * float(b.abs().max()) + 1e-9)
    one = editor.edit(requests[0])
    with torch.no_grad():
        shift = plain.shift(requests[0])
    for site in editor.sites:
        torch.testing.assert_close(
            one.dense(site.name), site.orient(shift[site.name]), rtol=1e-3, atol=1e-6
        )


def test_the_multiplier_climbs_by_a_group_of_its_own_and_stays_above_zero() -> None:
    editor = KE.from_model(*trained_tiny_model(), layers=[3], margin=1.0, warmup_steps=0)
    optimizer = editor.configure_optimizers()
    assert isinstance(optimizer, Optimizer)
    editor.network.multiplier.grad = torch.tensor(0.5)
    optimizer.step()
    # The first step of centered RMSprop is lr / sqrt(0.01 − 0.0001), whatever the violation.
    assert editor.network.multiplier.item() == pytest.approx(1 + 0.1 / 0.0099**0.5, rel=1e-5)
    for _ in range(3):
        editor.network.multiplier.grad = torch.tensor(-50.0)
        optimizer.step()
    assert editor.network.multiplier.item() == 0


def test_learning_rates_warm_up_from_zero() -> None:
    editor = KE.from_model(*trained_tiny_model(), layers=[3], warmup_steps=4)
    before = editor.network.condition.weight.clone()
    data = EditDataModule(requests=tiny_requests(2))
    bare_trainer(max_epochs=1, limit_train_batches=1).fit(editor, data)
    assert torch.equal(editor.network.condition.weight, before)
    bare_trainer(max_epochs=1).fit(editor, data)
    assert not torch.equal(editor.network.condition.weight, before)


def test_learning_rates_fall_to_zero_after_the_steps_that_are_given() -> None:
    editor = KE.from_model(*trained_tiny_model(), layers=[3], warmup_steps=2, decay_steps=6)
    found: Any = editor.configure_optimizers()
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    shares = [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]
    assert rates == [pytest.approx([3e-4 * share, 0.1 * share]) for share in shares]
    with pytest.raises(ValueError, match="`decay_steps` is expected to be more than `warmup_ste"):
        KE(warmup_steps=5, decay_steps=5)


def test_the_margin_shrinks_once_edits_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = KE.from_model(*trained_tiny_model(), layers=[3], margin=0.1, min_margin=0.07)
    data = HeldOut(EditDataModule(tiny_requests(2)), EditDataModule(tiny_requests(2)))
    trainer = bare_trainer(max_epochs=1, limit_val_batches=1.0, num_sanity_val_steps=1)
    trainer.fit(editor, data)
    assert trainer.callback_metrics["margin"].item() == pytest.approx(0.1)
    monkeypatch.setattr(editor.flipped, "compute", lambda: torch.tensor(0.95))
    for wanted in (0.08, 0.07, 0.07):
        bare_trainer(max_epochs=1, limit_val_batches=1.0).fit(editor, data)
        assert editor.network.margin.item() == pytest.approx(wanted)
    bare_trainer(limit_val_batches=1.0).validate(editor, data, verbose=False)
    assert editor.network.margin.item() == pytest.approx(0.07)


def test_the_old_answer_is_the_requests_or_what_the_model_says() -> None:
    editor = KE.from_model(*trained_tiny_model(), layers=[3])
    known = tiny_requests(1)[0]
    unknown = EditRequest("The capital of {} is", "Ostrane", "Dorin")
    assert editor.conditions([known, unknown]) == [
        "Dorin >> Kettleby || The capital of Velmora is",
        "Kettleby. >> Dorin || The capital of Ostrane is",
    ]


def test_it_makes_one_edit_at_a_time_of_rank_tokens_and_one() -> None:
    editor = KE.from_model(*trained_tiny_model(), layers=[3])
    with pytest.raises(EditError, match="one edit at a time, but got 2"):
        editor.edit(tiny_requests(2))
    with pytest.raises(ValueError, match="KE makes one edit at a time"):
        KE(edits_at_once=2)
    [request] = tiny_requests(1)
    change = editor.edit(request).changes["model.layers.3.mlp.down_proj.weight"]
    assert isinstance(change, LowRank)
    assert change.rank == len(editor.tokens.target(request.prompt, request.target_new)) + 1


def test_embeddings_are_the_models_unless_they_are_trained(tmp_path: Path) -> None:
    model, tokenizer = trained_tiny_model()
    frozen = KE.from_model(model, tokenizer, layers=[3])
    trained = KE.from_model(model, tokenizer, layers=[3], train_embeddings=True)
    assert not any("embeddings" in name for name in frozen.network.state_dict())
    table = trained.network.embeddings.weight
    assert torch.equal(table, model.get_input_embeddings().weight)
    assert table.requires_grad
    assert table is not model.get_input_embeddings().weight
    request = tiny_requests(1)[0]
    one, other = frozen.edit(request), trained.edit(request)
    assert all(torch.equal(one.dense(n), other.dense(n)) for n in one.changes)
