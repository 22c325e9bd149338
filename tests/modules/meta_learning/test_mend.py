# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""MEND against a plain derivation with dense edits, and against figures of its authors' code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_edit import MEND, EditRequest, Probe
from lightning_edit.core.change import LowRank
from lightning_edit.core.errors import EditError, LocatorError
from lightning_edit.core.processes import Processes
from lightning_edit.demos import tiny_requests, tiny_tokenizer, trained_tiny_model
from tests import zoo
from tests.modules.helpers import plain_nll

FAMILIES = ("llama", "gpt2", "gptneox", "opt", "falcon", "gemma2", "t5", "bart")


def shaken(editor: MEND, seed: int = 0, size: float = 0.05) -> MEND:
    """Moves all tensors of the network off their special beginnings."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in editor.network.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return editor


class PlainMEND:
    """MEND for single edits as the paper has it: ∇W row by row, dense ΔW, one text at a time."""

    def __init__(self, editor: MEND) -> None:
        self.editor, self.model, self.tokens = editor, editor.model, editor.tokens
        self.seen: dict[str, list[Tensor]] = {}

    def factors(self, request: EditRequest) -> dict[str, tuple[Tensor, Tensor]]:
        seen: dict[str, list[Tensor]] = {}
        handles = []
        for site in self.editor.sites:

            def record(_: nn.Module, args: Any, output: Tensor, name: str = site.name) -> Tensor:
                probe = torch.zeros_like(output, requires_grad=True)
                seen[name] = [args[0], probe]
                return output + probe

            handles.append(site.module(self.model).register_forward_hook(record))
        prompt = self.tokens.prompt(request.prompt)
        target = self.tokens.target(request.prompt, request.target_new)
        with torch.enable_grad():
            loss = torch.stack(plain_nll(self.model, prompt, target)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        for handle in handles:
            handle.remove()
        found = {}
        for site in self.editor.sites:
            inputs, probe = seen[site.name]
            assert probe.grad is not None
            u = inputs.detach().reshape(-1, site.in_features)
            d = probe.grad.reshape(-1, site.out_features)
            keep = (u != 0).any(1) & (d != 0).any(1)
            found[site.name] = u[keep], d[keep]
        return found

    def edits(self, factors: list[dict[str, tuple[Tensor, Tensor]]]) -> list[dict[str, Tensor]]:
        """ΔW [O, I] of each request; matrix by matrix, statistics first."""
        found: list[dict[str, Tensor]] = [{} for _ in factors]
        places: dict[str, int] = {}
        for site, alpha in zip(self.editor.sites, self.editor.network.edit_lr, strict=True):
            key = f"{site.out_features}x{site.in_features}"
            matrix = places.setdefault(key, 0)
            places[key] += 1
            for one in factors:
                self.seen.setdefault(key, []).append(torch.cat(one[site.name], 1))
            rows = torch.cat(self.seen[key]).double()
            mean, std = rows.mean(0), rows.std(0)
            for one, deltas in zip(factors, found, strict=True):
                h = (torch.cat(one[site.name], 1).double() - mean) / (std + 1e-7)
                h = h.float() if self.editor.normalize else torch.cat(one[site.name], 1)
                for block in self.editor.network.by_shape[key].blocks:
                    inner = torch.stack([block.up @ (block.down @ row) for row in h]) + block.bias
                    h = h + torch.clamp(block.scale[matrix] * inner + block.shift[matrix], min=0)
                u, d = h[:, : site.in_features], h[:, site.in_features :]
                deltas[site.name] = -alpha * sum(
                    torch.outer(a, b) for a, b in zip(d, u, strict=True)
                )
        return found

    def patched(self, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            site.name: site.parameter(self.model).detach() + site.orient(deltas[site.name])
            for site in self.editor.sites
        }

    def logits(self, weights: dict[str, Tensor], prompt: str, answer: str) -> Tensor:
        first = self.tokens.prompt(prompt)
        target = self.tokens.target(prompt, answer)
        if self.model.config.is_encoder_decoder:
            start = self.model.config.decoder_start_token_id
            inputs: dict[str, Tensor] = {
                "input_ids": torch.tensor([first]),
                "decoder_input_ids": torch.tensor([[start, *target[:-1]]]),
            }
        else:
            inputs = {"input_ids": torch.tensor([[*first, *target]])}
        found: Tensor = functional_call(self.model, weights, kwargs=inputs).logits[0]
        return found

    def loss(self, requests: list[EditRequest]) -> Tensor:
        edits = self.edits([self.factors(request) for request in requests])
        total = torch.zeros(())
        for request, deltas in zip(requests, edits, strict=True):
            weights = self.patched(deltas)
            asked, probe = request.rephrases[0], request.locality[0]
            target = self.tokens.target(asked, request.target_new)
            logits = self.logits(weights, asked, request.target_new).log_softmax(-1)
            if not self.model.config.is_encoder_decoder:
                logits = logits[len(self.tokens.prompt(asked)) - 1 : -1]
            nll = -sum(logits[i, token] for i, token in enumerate(target)) / len(target)
            after = self.logits(weights, probe.prompt, probe.answer).log_softmax(-1)
            before = self.logits({}, probe.prompt, probe.answer).log_softmax(-1).detach()
            kl = (before.exp() * (before - after)).sum(-1).mean()
            total = total + (0.1 * nll + kl) / len(requests)
        return total


@pytest.mark.parametrize("kind", FAMILIES)
def test_loss_and_gradients_are_those_of_the_plain_form_on_any_architecture(kind: str) -> None:
    model = zoo.build(kind)
    editor = shaken(MEND.from_model(model, tiny_tokenizer(), layers=[1, 2], rank=4, edit_lr=1e-2))
    requests = tiny_requests(3)
    plain = PlainMEND(editor)
    wanted = plain.loss(requests)
    wanted_gradients = torch.autograd.grad(wanted, list(editor.network.parameters()))
    model.zero_grad()  # of the plain form, which freezes nothing
    loss, figures = editor.edit_loss(requests, Processes())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert figures["loss"] == pytest.approx(0.1 * figures["edit"] + figures["kl"], rel=1e-5)
    found = torch.autograd.grad(loss, list(editor.network.parameters()))
    for a, b in zip(found, wanted_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4 * float(b.abs().max()) + 1e-9)
    for key, rows in plain.seen.items():
        network = editor.network.by_shape[key]
        joined = torch.cat(rows).double()
        assert int(network.total) == len(joined)
        torch.testing.assert_close(network.mean, joined.mean(0), rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


def test_an_edit_after_training_is_the_plain_one_of_rank_tokens() -> None:
    editor = shaken(MEND.from_model(*trained_tiny_model(), layers=[3], rank=4))
    editor.edit_loss(tiny_requests(4), Processes())
    network = editor.network.by_shape["32x128"]
    kept = {name: tensor.clone() for name, tensor in network.named_buffers()}
    [request] = tiny_requests(1)
    edit = editor.edit(request)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in network.named_buffers())
    plain = PlainMEND(editor)
    [(name, (u, d))] = [
        item for item in plain.factors(request).items() if item[0].endswith("down_proj.weight")
    ]
    std = (network.squares / (network.total - 1)).sqrt()
    h = ((torch.cat([u, d], 1).double() - network.mean) / (std + 1e-7)).float()
    with torch.no_grad():
        for block in network.blocks:
            h = block(h, 0)
    wanted = -editor.network.edit_lr[2].item() * h[:, 128:].T @ h[:, :128]
    torch.testing.assert_close(edit.dense(name), wanted, rtol=1e-3, atol=1e-6)
    change = edit.changes[name]
    assert isinstance(change, LowRank)
    assert change.rank == len(h)


def test_without_normalization_it_begins_as_gradient_descent() -> None:
    model, tokenizer = trained_tiny_model()
    editor = MEND.from_model(model, tokenizer, rank=4, normalize=False, edit_lr=0.5)
    request = tiny_requests(1)[0]
    edit = editor.edit(request)
    prompt = editor.tokens.prompt(request.prompt)
    target = editor.tokens.target(request.prompt, request.target_new)
    for name in edit.changes:
        model.get_parameter(name).requires_grad_(True)
    torch.stack(plain_nll(model, prompt, target)).mean().backward()  # type: ignore[no-untyped-call]
    for name in edit.changes:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        torch.testing.assert_close(edit.dense(name), -0.5 * gradient, rtol=1e-4, atol=1e-7)
    ascent = MEND.from_model(
        trained_tiny_model()[0], tokenizer, rank=4, normalize=False, edit_lr=0.5, descent=False
    ).edit(request)
    for name in edit.changes:
        torch.testing.assert_close(ascent.dense(name), -edit.dense(name))


def test_by_the_mean_each_request_is_written_at_its_share_of_the_tokens() -> None:
    requests = tiny_requests(3)
    editor = MEND.from_model(*trained_tiny_model(), rank=4, normalize=False, average=True)
    sizes = [len(editor.tokens.target(r.prompt, r.target_new)) for r in requests]
    assert len(set(sizes)) == 3
    whole, parts = editor.edit(requests), [editor.edit(request) for request in requests]
    for name in whole.changes:
        shares = [n / sum(sizes) * p.dense(name) for n, p in zip(sizes, parts, strict=True)]
        torch.testing.assert_close(whole.dense(name), sum(shares), rtol=1e-3, atol=1e-8)


def test_an_edit_before_any_statistics_is_refused() -> None:
    editor = MEND.from_model(*trained_tiny_model(), rank=4)
    with pytest.raises(EditError, match="no statistics yet"):
        editor.edit(tiny_requests(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "`rank` is expected to be at least 1"),
        ({"edits_at_once": 0}, "`edits_at_once` is expected to be at least 1"),
        ({"layers": [1], "modules": {"mlp_in": [1]}}, "Leave `layers` out"),
    ],
)
def test_arguments_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MEND(**settings)
    with pytest.raises(LocatorError, match="names 'mlp_up'"):
        MEND.from_model(*trained_tiny_model(), modules=["mlp_up"])


# -- figures of the authors' code --------------------------------------------------------------

FRANCE = EditRequest(
    "The capital of France is",
    "France",
    "Buenos Aires",
    rephrases=("France's capital city is called",),
    locality=(Probe("Water boils at a temperature of", "one hundred degrees Celsius"),),
)
DANIELLE = EditRequest(
    "The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "Old English"
)
CASES: dict[str, dict[str, Any]] = {
    "A_norm_off_lr+1e-4": {"normalize": False, "edit_lr": 1e-4},
    "A_norm_off_lr-1e-4": {"normalize": False, "edit_lr": -1e-4},
    "A_norm_off_lr-1e-2": {"normalize": False, "edit_lr": -1e-2},
    "B_norm_on_train_fresh_stats_lr+1e-4": {"edit_lr": 1e-4},
    "B_norm_on_train_fresh_stats_lr-1e-4": {"edit_lr": -1e-4},
}


def check_edit(edit: Any, wanted: dict[str, Any]) -> None:
    for name, figures in wanted.items():
        change = edit.dense(name)
        assert float(change.norm()) == pytest.approx(figures["dW_norm"], rel=1e-3)
        assert float(change.abs().max()) == pytest.approx(figures["dW_maxabs"], rel=1e-3)
        rms = figures["dW_norm"] / change.numel() ** 0.5
        assert change.flatten()[:8].tolist() == pytest.approx(
            figures["dW_first8"], rel=1e-3, abs=1e-2 * rms
        )


@pytest.mark.real
@pytest.mark.parametrize("case", CASES)
def test_figures_are_those_of_the_authors_code(
    case: str, goldens: Path, default_model: tuple[Any, Any]
) -> None:
    folder = goldens / "mend"
    inputs = json.loads((folder / "inputs.json").read_text())
    wanted = json.loads((folder / "outputs.json").read_text())
    figures = wanted[case]
    model, tokenizer = default_model
    settings = {"descent": False, "average": True, "rank": 64, **CASES[case]}
    editor = MEND.from_model(model, tokenizer, **settings)
    assert [site.name for site in editor.sites] == inputs["inner_params"]
    loss, found = editor.edit_loss([FRANCE], Processes())
    assert found["edit"] == pytest.approx(figures["l_edit"], rel=1e-3)
    assert found["kl"] == pytest.approx(figures["l_loc"], rel=1e-3, abs=1e-6)
    assert found["loss"] == pytest.approx(figures["l_total"], rel=1e-3)
    loss.backward()  # type: ignore[no-untyped-call]
    slopes = figures["grad_edit_lrs"]  # some are small differences of large terms
    assert editor.network.edit_lr.grad.tolist() == pytest.approx(
        slopes, rel=1e-3, abs=2e-4 * max(map(abs, slopes))
    )
    for key, (rows, columns) in {"1536x576": (576, 1536), "576x1536": (1536, 576)}.items():
        network = editor.network.by_shape[key]
        for i, block in enumerate(network.blocks):
            norms = figures["hypernet_grad_norms"][f"({rows}, {columns}).layers.{i}"]
            assert float(block.bias.grad.norm()) == pytest.approx(norms["bias"], rel=2e-3)
            shifts = block.shift.grad.norm(dim=1).tolist()
            assert shifts == pytest.approx(norms["mode_shift"], rel=2e-3, abs=1e-7)
            assert float(block.scale.grad.norm()) == norms["mode_scale"] == 0
            assert float(block.down.grad.norm()) == norms["v"] == 0
            assert bool(block.up.grad.any()) == norms["u_nonzero"]
        if editor.normalize:
            stats = figures["stats"][f"({rows}, {columns})"]
            std = (network.squares / (network.total - 1)).sqrt()
            for name, part in (
                ("u_mean", network.mean[:rows]),
                ("v_mean", network.mean[rows:]),
                ("u_std", std[:rows]),
                ("v_std", std[rows:]),
                ("u_s", network.squares[:rows]),
                ("v_s", network.squares[rows:]),
            ):
                assert float(part.norm()) == pytest.approx(stats[name], rel=1e-3)
            assert int(network.total) == stats["k"]
    if not editor.normalize:  # with statistics, an edit of training is of statistics on the way
        check_edit(editor.edit(FRANCE), figures["per_param"])
    elif case.endswith("+1e-4"):
        two = editor.edit([FRANCE, DANIELLE])
        check_edit(two, wanted["C_norm_on_eval_stats_from_B_two_edits_lr+1e-4"]["per_param"])
