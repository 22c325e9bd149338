# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""WISE against its formulas written out with dense matrices, and what its copies do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu
from torch.testing import assert_close

from lightning_edit import WISE, EditMemory, MemoryWrite
from lightning_edit.core.errors import EditError, ModelError
from lightning_edit.core.locator import Locator
from lightning_edit.core.side_memory import MemoryEntry
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.functional.wise import ties
from lightning_edit.memories.prompts import statement
from lightning_edit.memories.side_matrix import SideMatrices, mask_indices
from lightning_edit.modules.added_parameters import wise
from lightning_edit.modules.added_parameters.wise import _activation_name
from tests.modules.helpers import fingerprint, plain_nll, same

ACTIVATIONS: dict[str, Any] = {
    "llama": silu,
    "t5": relu,
    "gpt2": lambda x: gelu(x, approximate="tanh"),
}


def _plain_change(
    editor: WISE,
    kind: str,
    requests: list[Any],
    change: Tensor,
    kept: Tensor,
    number: int,
    steps: int,
) -> tuple[Tensor, float]:
    """The dense change of W after some steps on the last request, and the least D.

    Earlier requests are read without contexts.
    """
    *earlier, request = requests
    model, tokens, act = editor.model, editor.tokens, ACTIVATIONS[kind]
    [site] = Locator([2]).sites(model)
    layer, weight = site.module(model), site.read(model)
    inputs, outputs, _ = (part[number % len(part)] for part in editor._other_texts())
    texts = [(context.format(request.prompt), request) for context in editor.contexts]
    texts += [(one.prompt, one) for one in earlier]
    change = change.clone()
    least = 0.0
    for step in range(steps + 1):
        delta = change.clone().requires_grad_()
        nll, near = [], []
        for text, one in texts:
            prompt, target = tokens.prompt(text), tokens.target(one.prompt, one.target_new)
            columns = 1 if kind == "t5" else len(prompt)

            def put(_: nn.Module, args: Any, output: Tensor, columns: int = columns) -> Tensor:
                changed: Tensor = output + args[0] @ delta.T  # noqa: B023  # called at once
                moved = (act(changed) - act(output))[0, :columns]
                near.append(moved.norm(dim=1).mean())  # noqa: B023
                return changed

            hook = layer.register_forward_hook(put)
            nll.append(torch.stack(plain_nll(model, prompt, target)).mean())
            hook.remove()
        other = (act(outputs + inputs @ delta.T) - act(outputs)).square().sum(1)
        far = other.clamp_min(1e-24).sqrt().mean()
        loss = torch.stack(nll).mean()
        for d in near:
            loss = loss + (relu(far - 0.1) + relu(2.0 - d) + relu(far - d + 0.5)) / len(near)
        least = min(float(d.detach()) for d in near)
        if step < steps:
            (gradient,) = torch.autograd.grad(loss, [delta])
            gradient = gradient + 0.01 * (weight + change)
            change = (change - 0.5 * kept * gradient).clamp(-0.2, 0.2)
    return change, least


@pytest.mark.parametrize(
    ("kind", "replay"), [("llama", False), ("llama", True), ("t5", False), ("gpt2", False)]
)
def test_changes_are_those_of_the_plain_formulas(kind: Any, replay: bool) -> None:
    model, tokenizer = (
        trained_tiny_model() if kind == "llama" else (tiny_model(kind), tiny_tokenizer())
    )
    editor = WISE.from_model(
        model,
        tokenizer,
        layers=[2],
        margins=[0.1, 2.0, 0.5],
        steps=4,
        lr=0.5,
        weight_decay=0.01,
        bound=0.2,
        stop_loss=0.0,
        copy_size=2,
        context_templates=["{}", "Yes. {}"],
        replay=replay,
    )
    requests = tiny_requests(3)
    edit = editor.edit(requests)
    edit.apply_(model)
    side: Any = editor.memory
    kept_model = fingerprint(model)
    before = torch.zeros(32, 128)
    with side.off():
        for number, request in enumerate(requests):
            if number == 2:  # a fresh copy with a mask of its own
                before = torch.zeros(32, 128)
            kept = torch.zeros(32 * 128)
            kept[mask_indices(32 * 128, 0.2, number // 2)] = 1.0
            kept = kept.reshape(32, 128)
            seen = requests[number // 2 * 2 : number] if replay else []
            told = [*seen, request]
            after, least = _plain_change(editor, kind, told, before, kept, number, 4)
            entry = side.entries[request.id]
            found = side.matrix(number // 2, entry.tensors["changes"])
            torch.testing.assert_close(found, after - before, rtol=1e-3, atol=2e-5)
            assert torch.equal(found != 0, (found != 0) & (kept == 1))
            assert float(entry.tensors["distances"]) == pytest.approx(least, rel=1e-3)
            before = after
    assert fingerprint(model) == kept_model
    least = side.distances[:2].min()
    torch.testing.assert_close(side.thresholds, 0.88 * torch.stack([least, side.distances[2]]))


def _logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits


def _memory(model: Any, **settings: Any) -> SideMatrices:
    [site] = Locator([2]).sites(model)
    made = SideMatrices(site.module_name, (32, 128), keep_ratio=0.5, **settings)
    return made.attach_(model)


def _entry(number: int, change: Tensor, distance: float, name: str) -> MemoryEntry:
    tensors = {"changes": change, "distances": torch.tensor(distance)}
    return MemoryEntry(tensors, {name: {}}, {"number": number})


@pytest.mark.parametrize("routes_by", ["distance", "ratio"])
def test_the_copy_that_moves_a_prompt_most_answers_and_no_other(routes_by: Any) -> None:
    model, tokenizer = trained_tiny_model()
    base, _ = trained_tiny_model()
    [site] = Locator([2]).sites(model)
    side = _memory(model, copy_size=1, merged_copies=10, routes_by=routes_by)
    generator = torch.Generator().manual_seed(0)
    changes = [scale * torch.randn(2048, generator=generator) for scale in (0.05, 0.1)]
    rows = [tokenizer(r.prompt).input_ids for r in tiny_requests(6)]
    seen: list[tuple[Tensor, Tensor]] = []
    hook = site.module(base).register_forward_hook(lambda _, a, o: seen.append((a[0][0], o[0])))
    for row in rows:
        _logits(base, row)
    hook.remove()
    matrices = [side.matrix(i, change) for i, change in enumerate(changes)]
    distances = torch.tensor(
        [
            [float((silu(y + x @ m.T) - silu(y)).norm(dim=1).mean()) for m in matrices]
            for x, y in seen
        ]
    )
    # Thresholds in the midst of what is found: some rows are answered, and some are not.
    middle = distances.median(0).values / 0.88
    names = ("a", "b")
    side.write({n: _entry(i, changes[i], float(middle[i]), n) for i, n in enumerate(names)})
    above = distances >= 0.88 * middle
    routes = []
    for row, found, is_above in zip(rows, distances, above, strict=True):
        size = found / middle if routes_by == "ratio" else found
        route = int(torch.where(is_above, size, -1.0).argmax()) if bool(is_above.any()) else -1
        routes.append(route)
        wanted = _logits(base, row)
        if route >= 0:
            weight = site.parameter(base)
            with torch.no_grad():
                kept = weight.clone()
                weight.add_(matrices[route])
            wanted = _logits(base, row)
            with torch.no_grad():
                weight.copy_(kept)
            torch.testing.assert_close(_logits(model, row), wanted, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(_logits(model, row), wanted)
    # The second copy moves every prompt further, so that the first one answers by ratio alone.
    assert set(routes) == ({-1, 0, 1} if routes_by == "ratio" else {-1, 1})
    # Generated tokens keep the route of their prompt.
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    i = routes.index(max(routes))
    ids = torch.tensor([rows[i]])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    with torch.no_grad():
        site.parameter(base).add_(matrices[routes[i]])
    assert torch.equal(base.generate(ids, attention_mask=torch.ones_like(ids), **settings), found)


def test_full_copies_are_merged_and_come_apart_again() -> None:
    model, _ = trained_tiny_model()
    side = _memory(model, copy_size=1, merged_copies=2, density=0.6)
    changes = [torch.randn(2048, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    entries = {n: _entry(i, changes[i].clamp(-1, 1), 2.0 + i, n) for i, n in enumerate("abc")}
    side.write(dict(list(entries.items())[:1]))
    assert side.matrices.shape == (1, 32, 128)
    side.write(entries)
    first = [side.matrix(i, entries[n].tensors["changes"]) for i, n in enumerate("abc")]
    assert side.matrices.shape == (2, 32, 128)
    assert torch.equal(side.matrices[0], ties(torch.stack(first[:2]), 0.6))
    assert torch.equal(side.matrices[1], first[2])
    torch.testing.assert_close(side.thresholds, torch.tensor([0.88 * 2.0, 0.88 * 4.0]))
    side.write(side.without(["a"]))
    assert torch.equal(side.matrices[0], first[1])
    assert float(side.thresholds[0]) == pytest.approx(0.88 * 3.0)


def test_ties_trims_elects_and_averages() -> None:
    vectors = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3))
    wanted = torch.zeros(20)
    rows = [row.clone() for row in vectors.flatten(1)]
    for row in rows:
        least = sorted(row.abs().tolist())[-10]
        row[row.abs() < least] = 0.0
    for i in range(20):
        column = [float(row[i]) for row in rows]
        sign = 1 if sum(column) > 0 else -1
        agreeing = [value for value in column if value * sign > 0]
        wanted[i] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    torch.testing.assert_close(ties(vectors, 0.5), wanted.reshape(4, 5))


@pytest.mark.filterwarnings("ignore:The memory forgets:UserWarning")
def test_an_edits_own_change_is_taken_out_and_the_rest_stays() -> None:
    model, tokenizer = trained_tiny_model()
    before, weights = fingerprint(model), dict(model.named_parameters())
    editor = WISE.from_model(model, tokenizer, layers=[2], steps=3)
    requests = tiny_requests(3)
    editor.edit(requests).apply_(model)
    changes = {r.id: editor.side.entries[r.id].tensors["changes"].clone() for r in requests}
    total = editor.side.matrices[0].clone()
    removal = editor.remove([requests[1].id])
    rest = (changes[requests[0].id] + changes[requests[2].id]).clamp(-1, 1)
    assert torch.equal(editor.side.matrices[0], editor.side.matrix(0, rest))
    removal.revert_(model)
    assert torch.equal(editor.side.matrices[0], total)
    editor.remove([request.id for request in requests])
    assert fingerprint(model) == before
    assert same(model, {name: p.detach() for name, p in weights.items()})


def test_the_state_dict_brings_the_matrices_along() -> None:
    editor = WISE.from_model(*trained_tiny_model(), layers=[2], steps=2)
    editor.edit(tiny_requests(2)).apply_(editor.model)
    state = editor.state_dict()
    assert not any(name.endswith(("matrices", "thresholds")) for name in state)
    other = WISE.from_model(*trained_tiny_model(), layers=[2], steps=2)
    other.load_state_dict(state, strict=False)
    assert torch.equal(other.side.matrices, editor.side.matrices)
    assert torch.equal(other.side.thresholds, editor.side.thresholds)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"layers": [0, 1]}, EditError, "WISE edits one layer"),
        ({"steps": 0}, ValueError, "`steps` is expected to be at least 1"),
        ({"copy_size": 0}, ValueError, "`copy_size` is expected to be at least 1"),
        ({"keep_ratio": 0.0}, ValueError, "`keep_ratio` is expected to be above 0"),
        ({"density": 1.5}, ValueError, "`density` is expected to be above 0"),
        ({"margins": [1.0]}, ValueError, "`margins` is expected to be α, β and γ"),
        ({"routes_by": "size"}, ValueError, "`routes_by` is expected to be one of distance"),
        ({"context_templates": ["x"]}, ValueError, "is expected to end in {}"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    model, tokenizer = trained_tiny_model()
    with pytest.raises(error, match=words):
        WISE.from_model(model, tokenizer, **settings)
    assert EditMemory.find(model) is None


def test_a_model_without_a_named_activation_is_told() -> None:
    with pytest.raises(ModelError, match="does not name an activation function"):
        _activation_name(nn.Linear(2, 2))


def test_other_text_may_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["Velmora has a flag that is red.", "People in Ostrane speak Ostrish.", "Dorin"]
    own = WISE.from_model(*trained_tiny_model(), steps=3).edit(tiny_requests(2))
    monkeypatch.setattr(wise, "sample_text_ids", None)  # it is not asked for
    given = WISE.from_model(*trained_tiny_model(), steps=3, other_texts=texts)
    edit = given.edit(tiny_requests(2))
    assert edit.norm() != own.norm()
    inputs, _, mask = given._other_texts()
    assert mask.sum(1).tolist() == [len(given.tokens.tokenizer(t)["input_ids"]) for t in texts]
    assert inputs.shape[:2] == mask.shape
    for wrong in ([], ["a", " "]):
        with pytest.raises(ValueError, match="`other_texts` is expected to hold texts"):
            WISE.from_model(*trained_tiny_model(), other_texts=wrong)


def _tensors(edit: MemoryWrite, name: str) -> dict[str, Tensor]:
    entry = edit.entries[name]
    assert entry is not None
    return dict(entry.tensors)


def test_a_requests_own_locality_may_be_the_other_text() -> None:
    model, tokenizer = trained_tiny_model()
    [request] = tiny_requests(1)
    assert request.locality
    own = WISE.from_model(model, tokenizer, steps=3, own_locality=True)
    edit = own.edit(request)
    texts = [statement(probe.prompt, probe.answer) for probe in request.locality]
    given = WISE.from_model(model, tokenizer, steps=3, other_texts=texts).edit(request)
    assert_close(_tensors(edit, request.id), _tensors(given, request.id))
    # Of a request that has none, the texts of all requests are taken.
    bare = replace(request, locality=())
    plain = WISE.from_model(model, tokenizer, steps=3).edit(bare)
    assert_close(_tensors(own.edit(bare), request.id), _tensors(plain, request.id))


def test_a_long_prompt_is_found_by_the_largest_distance_of_its_tokens() -> None:
    model, tokenizer = trained_tiny_model()
    base, _ = trained_tiny_model()
    [site] = Locator([2]).sites(model)
    row = tokenizer(tiny_requests(1)[0].prompt).input_ids
    change = 0.1 * torch.randn(2048, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[Tensor, Tensor]] = []
    hook = site.module(base).register_forward_hook(lambda _, a, o: seen.append((a[0][0], o[0])))
    wanted = _logits(base, row)
    hook.remove()
    for long_prompt, is_found in ((len(row), True), (len(row) + 1, False), (None, False)):
        side = _memory(model, copy_size=1, long_prompt=long_prompt)
        [(x, y)] = seen
        distances = (silu(y + x @ side.matrix(0, change).T) - silu(y)).norm(dim=1)
        middle = float(distances.mean() + distances.max()) / 2  # a mean does not reach it
        side.write({"a": _entry(0, change, middle / 0.88, "a")})
        assert (not torch.equal(_logits(model, row), wanted)) is is_found
        side.detach_()
    with pytest.raises(ValueError, match="`long_prompt` is expected to be at least 1"):
        WISE.from_model(model, tokenizer, long_prompt=0)
