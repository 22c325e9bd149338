# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""MALMEN against a plain derivation: the system as it is printed, dense shifts, all by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_edit import MALMEN, EditRequest, RLEdit
from lightning_edit.core.errors import EditError
from lightning_edit.core.processes import Processes
from lightning_edit.demos import tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.modules.meta_learning.factor_network import CHUNK
from tests import zoo
from tests.modules.meta_learning.test_mend import PlainMEND, shaken

EPS = torch.finfo(torch.float32).eps
FAMILIES = ("llama", "gpt2", "falcon", "t5", "bart")


class PlainMALMEN(PlainMEND):
    """MALMEN with one dense shift of all requests."""

    def shifts(self, requests: list[EditRequest]) -> dict[str, Tensor]:
        editor = self.editor
        taken = [self.factors(request) for request in requests]
        sizes = [
            len(self.tokens.target(request.prompt, request.target_new)) for request in requests
        ]
        joined: dict[str, tuple[Tensor, Tensor]] = {}
        decoder = tuple(f"{name}." for name in editor.tree.block_names)
        for site in editor.sites:
            keys, gradients = [], []
            for one, request, size in zip(taken, requests, sizes, strict=True):
                u, d = one[site.name]
                d = d * size / sum(sizes)  # of the mean over all tokens
                if site.name.startswith(decoder) and not editor.tree.is_encoder_decoder:
                    # The rows are those up to the last place that predicts.
                    first = len(self.tokens.prompt(request.prompt)) - 1
                    u, d = u[-size:] if len(u) == size else u[first:], d[-size:]
                keys.append(u)
                gradients.append(d)
            joined[site.name] = torch.cat(keys), torch.cat(gradients)
            key = f"{site.out_features}x{site.in_features}"
            self.seen.setdefault(key, []).append(torch.cat(joined[site.name], 1))
        found = {}
        places: dict[str, int] = {}
        network = editor.network
        for i, site in enumerate(editor.sites):
            key = f"{site.out_features}x{site.in_features}"
            matrix = places.setdefault(key, 0)
            places[key] += 1
            rows = torch.cat(self.seen[key]).double()
            k, g = joined[site.name]
            h = ((torch.cat([k, g], 1).double() - rows.mean(0)) / (rows.std(0) + EPS)).float()
            for block in network.by_shape[key].blocks:
                inner = torch.clamp(h @ block.down @ block.up + block.bias, min=0)
                h = h + block.scale[matrix] * inner + block.shift[matrix]
            coefficients = -network.edit_lr[i] * (k * h[:, : site.in_features]).sum(1)
            values = coefficients[:, None] * h[:, site.in_features :]
            system = k.T.double() @ k.double() + network.log_ridge[i].double().exp() * torch.eye(
                site.in_features, dtype=torch.float64
            )
            found[site.name] = torch.linalg.solve(system, k.T.double() @ values.double()).T.float()
        return found

    def loss(self, requests: list[EditRequest]) -> Tensor:
        weights = self.patched(self.shifts(requests))
        nll, kl = [], []
        for request in requests:
            asked, probe = request.rephrases[0], request.locality[0]
            for prompt, answer in ((asked, request.target_new), (probe.prompt, probe.answer)):
                target = self.tokens.target(prompt, answer)
                after = self.logits(weights, prompt, answer).log_softmax(-1)
                before = self.logits({}, prompt, answer).log_softmax(-1).detach()
                if not self.model.config.is_encoder_decoder:
                    places = slice(len(self.tokens.prompt(prompt)) - 1, -1)
                    after, before = after[places], before[places]
                if prompt == asked:
                    nll += [-after[i, token] for i, token in enumerate(target)]
                else:
                    kl += list((before.exp() * (before - after)).sum(-1))
        return torch.stack(nll).mean() + torch.stack(kl).mean()


@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_and_gradients_are_those_of_the_plain_form(kind: str) -> None:
    model = zoo.build(kind)
    # Of the last layer alone all rows with a gradient are those that predict.
    settings: dict[str, Any] = {"layers": [2], "modules": ["mlp_out"], "stacks": ["decoder"]}
    editor = MALMEN.from_model(model, tiny_tokenizer(), rank=4, edit_lr=1e-2, **settings)
    shaken(editor)  # type: ignore[arg-type]
    requests = tiny_requests(5)
    plain = PlainMALMEN(editor)  # type: ignore[arg-type]
    wanted = plain.loss(requests)
    wanted_gradients = torch.autograd.grad(wanted, list(editor.network.parameters()))
    loss, _ = editor.edit_loss(requests, Processes())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    found = torch.autograd.grad(loss, list(editor.network.parameters()))
    for a, b in zip(found, wanted_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=1e-3 * float(b.abs().max()) + 1e-8)
    edit = editor.edit(requests)
    with torch.no_grad():
        plain.seen.clear()
        shifts = plain.shifts(requests)
    for site in editor.sites:
        torch.testing.assert_close(
            edit.dense(site.name), site.orient(shifts[site.name]), rtol=1e-3, atol=1e-6
        )


def test_passes_change_nothing_without_normalization_either() -> None:
    def loss_of(size: int) -> float:
        editor = MALMEN.from_model(
            *trained_tiny_model(), rank=4, edit_lr=1e-2, normalize=False, micro_batch_size=size
        )
        return editor.edit_loss(tiny_requests(6), Processes())[0].item()

    assert loss_of(2) == pytest.approx(loss_of(6), rel=1e-4)


def test_many_rows_go_through_in_parts_with_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gradients() -> list[Tensor]:
        editor = MALMEN.from_model(*trained_tiny_model(), rank=4, edit_lr=1e-2)
        shaken(editor)  # type: ignore[arg-type]
        loss, _ = editor.edit_loss(tiny_requests(6), Processes())
        return list(torch.autograd.grad(loss, list(editor.network.parameters())))

    wanted = gradients()
    assert CHUNK > 100
    monkeypatch.setattr("lightning_edit.modules.meta_learning.factor_network.CHUNK", 4)
    for a, b in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-9)


def test_biased_statistics_are_the_authors_and_need_two_rows() -> None:
    def squares(size: int, *, biased: bool) -> Tensor:
        editor = MALMEN.from_model(
            *trained_tiny_model(), rank=4, biased_variance=biased, micro_batch_size=size
        )
        editor.edit_loss(tiny_requests(6), Processes())
        [network] = editor.network.by_shape.values()
        found: Tensor = network.squares[:128]  # of inputs, which no scale of a loss changes
        return found

    exact = squares(6, biased=False)
    torch.testing.assert_close(squares(3, biased=False), exact, rtol=1e-5, atol=1e-5)
    assert bool((squares(6, biased=True) > exact).any())
    assert bool((squares(3, biased=True) > squares(6, biased=True)).any())
    editor = MALMEN.from_model(*trained_tiny_model(), rank=4, biased_variance=True)
    with pytest.raises(EditError, match="has no variance"):
        editor.edit_loss([EditRequest_with_one_token()], Processes())


def EditRequest_with_one_token() -> EditRequest:  # noqa: N802
    """A request whose answer is one token."""
    editor = MALMEN.from_model(*trained_tiny_model(), rank=4)
    return next(
        request
        for request in tiny_requests(24)
        if len(editor.tokens.target(request.prompt, request.target_new)) == 1
    )


# -- sequences ---------------------------------------------------------------------------------


def test_with_a_sequence_it_is_trained_as_rledit_is() -> None:
    settings: dict[str, Any] = {"rank": 4, "blocks": 2, "edit_lr": 1e-2, "lr": 1e-3}
    shared = {**settings, "modules": ["mlp_out"], "micro_batch_size": 2, "locality_weight": 0.6}
    found = []
    for cls in (MALMEN, RLEdit):
        editor = cls.from_model(*trained_tiny_model(), **shared, sequence=2)
        loss, figures = editor.edit_loss(tiny_requests(4), Processes())
        gradients = torch.autograd.grad(loss, list(editor.network.parameters()))
        found.append((figures, gradients))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_sequence_divides_batches_itself() -> None:
    with pytest.raises(ValueError, match="Leave `edits_at_once` out"):
        MALMEN(sequence=2, edits_at_once=2)
