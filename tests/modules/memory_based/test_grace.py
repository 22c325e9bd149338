# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""GRACE against a plain implementation of its formulas, one request and one pass at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edit import GRACE, EditMemory, EditRequest
from lightning_edit.core.errors import EditError, LocatorError
from lightning_edit.core.locator import Locator
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.passes.replay import blocks_below
from tests.modules.helpers import computed, fingerprint, plain_nll, same_edit


class PlainGrace:
    """A codebook as arXiv 2211.11031 has it, in the order of the authors' loop."""

    def __init__(self, layer: nn.Module, radius: float, where: str, expansion: str) -> None:
        self.layer, self.radius, self.where, self.expansion = layer, radius, where, expansion
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.radii: list[float] = []
        self.labels: list[list[int]] = []

    def edit(
        self, model: Any, prompt: list[int], target: list[int], at: int, value: Tensor, steps: int
    ) -> None:
        seen: list[Tensor] = []
        hook = self.layer.register_forward_hook(lambda _, args, __: seen.append(args[0][0, at]))
        with torch.no_grad():
            plain_nll(model, prompt, target)
        hook.remove()
        query = seen[0].detach()
        distances = [float((query - key).norm()) for key in self.keys]
        chosen = len(self.keys)
        near = min(range(chosen), key=distances.__getitem__) if chosen else 0
        if not chosen or distances[near] > self.radius + self.radii[near]:
            self._add(query, value, self.radius, target)
        elif self.labels[near] == target:
            chosen = near
            if distances[near] > self.radii[near]:
                self.radii[near] = distances[near]
                if self.expansion == "moving_average":
                    self.keys[near] = (self.keys[near] + query) / 2
        else:
            self._add(query, value, distances[near] / 2, target)
            self.radii[near] = distances[near] / 2 - 1e-5
        learned = nn.Parameter(self.values[chosen].clone())
        adam = torch.optim.Adam([learned], lr=1.0)

        def put(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            output = output.clone()
            columns = {"last": slice(at, at + 1), "prompt": slice(0, at), "all": slice(None)}
            output[0, columns[self.where]] = learned
            return output

        hook = self.layer.register_forward_hook(put)
        for _ in range(steps):
            loss = torch.stack(plain_nll(model, prompt, target)).mean()
            (learned.grad,) = torch.autograd.grad(loss, [learned])
            adam.step()
        hook.remove()
        self.values[chosen] = learned.detach()

    def _add(self, key: Tensor, value: Tensor, radius: float, label: list[int]) -> None:
        self.keys.append(key)
        self.values.append(value)
        self.radii.append(radius)
        self.labels.append(label)


def _requests() -> list[EditRequest]:
    """Facts far apart, one in other words with the same answer, and one near by with another."""
    first, second, *_ = tiny_requests(3)
    rephrased = EditRequest(first.rephrases[0], first.subject, first.target_new, id="rephrased")
    neighbor = EditRequest("The capital of Quillia is", "Quillia", "Nimbus", id="neighbor")
    again = EditRequest(first.prompt, first.subject, first.target_new, id="again")
    return [first, second, rephrased, neighbor, again]


CASES = [
    pytest.param("llama", "decoder", "mlp_out", "last", "coverage", id="llama"),
    pytest.param("llama", "decoder", "mlp_out", "prompt", "moving_average", id="prompt"),
    pytest.param("llama", "decoder", "mlp_out", "all", "coverage", id="all"),
    pytest.param("gpt2", "decoder", "mlp_in", "last", "coverage", id="gpt2"),
    pytest.param("t5", "decoder", "mlp_out", "last", "coverage", id="t5-decoder"),
    pytest.param("t5", "encoder", "mlp_out", "prompt", "coverage", id="t5-encoder"),
]


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in a batch"])
@pytest.mark.parametrize(("kind", "stack", "module", "where", "expansion"), CASES)
def test_the_codebook_is_that_of_the_plain_formulas(
    kind: Any, stack: Any, module: Any, where: Any, expansion: Any, together: bool
) -> None:
    model, tokenizer = (
        trained_tiny_model() if kind == "llama" else (tiny_model(kind), tiny_tokenizer())
    )
    settings: dict[str, Any] = {"steps": 4, "stop_loss": 0.0, "layers": [2], "module": module}
    settings |= {"replacement": where, "expansion": expansion, "stack": stack}
    [site] = Locator([2], module, stack).sites(model)
    radius = 0.6 * _distance(model, tokenizer, site.module(model))
    editor = GRACE.from_model(model, tokenizer, radius=radius, **settings)

    requests = _requests()
    plain = PlainGrace(site.module(model), radius, where, expansion)
    width = site.out_features
    for request in requests:
        prompt = editor.tokens.prompt(request.prompt)
        target = editor.tokens.target(request.prompt, request.target_new)
        at = 0 if kind == "t5" and stack == "decoder" else len(prompt) - 1
        # The n-th entry begins from seed + n; a batch draws for its requests at once.
        n = requests.index(request) if together else len(plain.keys)
        noise = torch.rand(width, generator=torch.Generator().manual_seed(n))
        plain.edit(model, prompt, target, at, noise, settings["steps"])

    if together:
        edit = editor.edit(requests)
        edit.apply_(model)
    else:
        for request in requests:
            editor.edit_optimizer.stage(editor.edit(request))
            editor.edit_optimizer.step()
    memory: Any = editor.memory
    assert len(memory) == len(plain.keys) >= 1
    torch.testing.assert_close(memory.keys, torch.stack(plain.keys), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(memory.radii, torch.tensor(plain.radii), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(memory.values, torch.stack(plain.values), rtol=1e-3, atol=2e-3)
    assert [entry.notes["label"] for entry in memory.entries.values()] == plain.labels


def _distance(model: Any, tokenizer: Any, layer: nn.Module) -> float:
    """How far the keys of two facts of a relation are apart."""
    keys: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, args, __: keys.append(args[0][0, -1].detach()))
    for country in ("Velmora", "Quillia"):
        ids = tokenizer(f"The capital of {country} is", return_tensors="pt").input_ids
        more = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)}
        with torch.no_grad():
            model(input_ids=ids, **(more if model.config.is_encoder_decoder else {}))
    hook.remove()
    return float((keys[0] - keys[1]).norm())


def test_what_becomes_of_an_edit_is_told() -> None:
    model, tokenizer = trained_tiny_model()
    [site] = Locator([2]).sites(model)
    d = _distance(model, tokenizer, site.module(model))
    editor = GRACE.from_model(model, tokenizer, layers=[2], radius=0.6 * d, steps=2)
    first, *_ = tiny_requests(1)
    neighbor = EditRequest("The capital of Quillia is", "Quillia", "Nimbus", id="neighbor")
    other = EditRequest(first.prompt, first.subject, "Nimbus", id="other")
    rows = editor.edit([first, neighbor]).details["requests"]
    assert [row["placed"] for row in rows] == ["added", "split"]
    # A radius that had grown for a request shrinks by a split, and the request lies outside.
    grown = GRACE.from_model(*trained_tiny_model(), layers=[2], radius=10 * d, steps=2)
    far = EditRequest("People in Tasmere speak", "Tasmere", first.target_new, id="far")
    rows = grown.edit([first, far, neighbor]).details["requests"]
    assert [row["placed"] for row in rows] == ["added", "covered", "split"]
    assert rows[2]["dropped"] == ["far"]
    # The very prompt of another answer: the newer one holds.
    editor.edit(first).apply_(model)
    edit = editor.edit(other)
    [row] = edit.details["requests"]
    assert (row["placed"], row["dropped"]) == ("replaced", [first.id])
    edit.apply_(model)
    assert list(editor.memory.requests) == ["other"]
    assert float(editor.memory.entries["other"].tensors["radii"]) == pytest.approx(0.6 * d)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_only_the_layers_above_are_run_again(kind: Any) -> None:
    model, tokenizer = (
        trained_tiny_model() if kind == "llama" else (tiny_model(kind), tiny_tokenizer())
    )
    editor = GRACE.from_model(model, tokenizer, layers=[2], steps=5, stop_loss=0.0)
    blocks = blocks_below(editor.tree, 2)
    runs = dict.fromkeys(range(len(blocks)), 0)
    counted = [m for b in blocks for m in [next(c for c in b.modules() if not list(c.children()))]]

    def count(i: int) -> Any:
        return lambda *_: runs.__setitem__(i, runs[i] + 1)

    hooks = [m.register_forward_hook(count(i)) for i, m in enumerate(counted)]
    computed(editor, tiny_requests(3))
    for hook in hooks:
        hook.remove()
    assert set(runs.values()) == {2}  # once for the keys, once for all the steps
    assert all("forward" not in block.__dict__ for block in blocks)


def test_learning_stops_request_by_request() -> None:
    editor = GRACE.from_model(*trained_tiny_model(), layers=[1], steps=200, stop_loss=0.2)
    edit = editor.edit(tiny_requests(3))
    rows = edit.details["requests"]
    assert all(row["loss"] < 0.2 for row in rows)
    assert len({row["steps"] for row in rows}) > 1
    losses = edit.details["losses"]
    for row, own in zip(rows, losses, strict=True):
        assert len(own) == row["steps"] + 1
        assert own[-1] == row["searched_loss"] < 0.2 <= min(own[:-1])
    alone = editor.edit(tiny_requests(3)[:1])
    assert alone.details["requests"][0]["steps"] == rows[0]["steps"]


def test_a_request_of_the_same_id_takes_the_place_of_the_earlier() -> None:
    editor = GRACE.from_model(*trained_tiny_model(), layers=[1], steps=3)
    first, second = tiny_requests(2)
    for request in (first, second):
        editor.edit_optimizer.stage(editor.edit(request))
        editor.edit_optimizer.step()
    changed = EditRequest(first.prompt, first.subject, "Nimbus", id=first.id)
    editor.edit_optimizer.stage(editor.edit(changed))
    editor.edit_optimizer.step()
    assert list(editor.memory.requests) == [first.id, second.id]
    assert editor.memory.requests[first.id]["target"] == "Nimbus"


def test_edits_are_taken_out_by_their_id() -> None:
    model, tokenizer = trained_tiny_model()
    editor = GRACE.from_model(model, tokenizer, layers=[1], steps=3)
    base = fingerprint(model)
    requests = tiny_requests(3)
    editor.edit_optimizer.stage(editor.edit(requests))
    editor.edit_optimizer.step()
    before = fingerprint(model)
    with pytest.raises(EditError, match=r"No request with the id 'x'.*In it: capital-velmora"):
        editor.remove([requests[0].id, "x"])
    assert fingerprint(model) == before
    removal = editor.remove([requests[1].id])
    assert list(editor.memory.requests) == [requests[0].id, requests[2].id]
    removal.revert_(model)
    assert fingerprint(model) == before
    assert set(editor.committed().provenance.request_ids) == {r.id for r in requests}
    with pytest.warns(UserWarning, match="1 others stay as they were made"):  # not committed
        editor.remove([requests[2].id, requests[0].id])
    assert list(editor.memory.requests) == [requests[1].id]
    editor.remove([requests[1].id])
    assert fingerprint(model) == base
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_shared_entry_shrinks_to_what_is_left() -> None:
    model, tokenizer = trained_tiny_model()
    [site] = Locator([2]).sites(model)
    d = _distance(model, tokenizer, site.module(model))
    editor = GRACE.from_model(model, tokenizer, layers=[2], radius=0.6 * d, steps=2)
    first, *_ = tiny_requests(1)
    near = EditRequest("The capital of Quillia is", "Quillia", first.target_new, id="near")
    editor.edit_optimizer.stage(editor.edit([first, near]))
    editor.edit_optimizer.step()
    memory: Any = editor.memory
    assert len(memory) == 1
    assert float(memory.radii) == pytest.approx(d)
    editor.remove(["near"])
    assert float(memory.radii) == pytest.approx(0.6 * d)
    assert list(memory.requests) == [first.id]


def test_a_full_memory_loses_nothing() -> None:
    model, tokenizer = trained_tiny_model()
    editor = GRACE.from_model(model, tokenizer, layers=[1], steps=3, max_entries=2)
    editor.edit_optimizer.stage(editor.edit(tiny_requests(2)))
    editor.edit_optimizer.step()
    before = fingerprint(model)
    with pytest.raises(EditError, match=r"holds 2 of `max_entries=2` entries.*editor\.remove"):
        editor.edit(tiny_requests(3)[2:])
    assert fingerprint(model) == before
    editor.edit(tiny_requests(2)[:1])  # in place of an earlier one


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"expansion": "x"}, ValueError, "`expansion` is expected to be one of coverage"),
        ({"replacement": "x"}, ValueError, "`replacement` is expected to be one of last"),
        ({"value_init": "x"}, ValueError, "`value_init` is expected to be one of cold"),
        ({"steps": 0}, ValueError, "`steps` is expected to be at least 1"),
        ({"radius": 0.0}, ValueError, "`radius` is expected to be above 0"),
        ({"max_entries": 0}, ValueError, "`max_entries` is expected to be at least 1"),
        ({"layers": [0, 1]}, EditError, "GRACE edits one linear map, but .* name 2"),
        ({"module": "mlp_in"}, EditError, "name 2.*`mlp_out` where the MLP is gated"),
        ({"stack": "encoder"}, LocatorError, "has no encoder"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    model, tokenizer = trained_tiny_model()
    with pytest.raises(error, match=words):
        GRACE.from_model(model, tokenizer, **settings)
    assert EditMemory.find(model) is None
    assert all(p.requires_grad for p in model.parameters())


def test_a_warm_value_begins_as_the_layers_own_output() -> None:
    editor = GRACE.from_model(*trained_tiny_model(), value_init="warm")
    outputs = torch.randn(2, 32)
    assert torch.equal(editor.initial_values(outputs, 0), outputs)


def test_another_seed_gives_other_values() -> None:
    first, second = (
        GRACE.from_model(*trained_tiny_model(), steps=2, seed=seed).edit(tiny_requests(1))
        for seed in (0, 1)
    )
    assert not same_edit(first, second)
