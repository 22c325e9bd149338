# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""T-Patcher against its formulas written out with the model's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edit import EditMemory, EditRequest, TPatcher
from lightning_edit.core.errors import EditError
from lightning_edit.core.locator import ModelTree
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.functional.patches import activation_loss, margin_losses
from lightning_edit.modules.added_parameters.t_patcher import PatchParameters
from tests.modules.helpers import fingerprint

MEMORY = torch.randn(50, 32, generator=torch.Generator().manual_seed(7))


class Pinned(TPatcher):
    """With given initial patches and a given memory."""

    def remembered_states(self) -> Tensor:
        return MEMORY

    def initial_patches(self, queries: Tensor, first: int) -> PatchParameters:
        found = super().initial_patches(queries, first)
        found.biases = 0.1 * torch.arange(1.0, len(queries) + 1)
        return found


def _plain_logits(
    model: Any, prompt: list[int], target: list[int], patches: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Logits of the target's places, and the MLP's inputs there, of one unpadded row."""
    tree = ModelTree.of(model)
    mlp, states = tree.mlp(-1), []

    def patched(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        states.append(args[0][0].detach())
        if patches is None:
            return output
        keys, biases, values = patches
        return output + torch.relu(args[0] @ keys.T + biases) @ values

    hook = mlp.register_forward_hook(patched)
    if model.config.is_encoder_decoder:
        given = torch.tensor([[model.config.decoder_start_token_id, *target[:-1]]])
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=given).logits[0]
        seen = states[-1]
    else:
        logits = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
        seen = states[-1][len(prompt) - 1 : -1]
    hook.remove()
    return logits, seen


def _plain_patches(
    model: Any,
    prompt: list[int],
    target: list[int],
    earlier: list[Tensor],
    memory: Tensor,
    held_out: int,
    steps: int,
) -> list[Tensor] | None:
    """Keys, biases, values and states after some steps, from section 3 of arXiv 2301.09785."""
    wanted = torch.tensor(target)
    before = earlier if len(earlier[0]) else None
    logits, states = _plain_logits(model, prompt, target, before)
    wrong = [i for i, token in enumerate(target) if int(logits[i].argmax()) != token][:5]
    if not wrong:
        return None
    h = states[wrong]
    size, vocabulary = len(wrong), logits.shape[1]
    n = len(earlier[0])
    noise = [torch.randn(32, generator=torch.Generator().manual_seed(n + i)) for i in range(size)]
    k = nn.Parameter(h / (h * h).sum(1, keepdim=True))
    b = nn.Parameter(0.1 * torch.arange(1.0, size + 1))
    w, c = nn.Parameter(torch.stack(noise)), nn.Parameter(torch.full((size,), 10.0))
    adam = torch.optim.Adam([k, b, w, c], lr=1e-2, weight_decay=1e-2)
    for _ in range(steps):
        patches = [
            torch.cat([old, new]) for old, new in zip(earlier, [k, b, c[:, None] * w], strict=True)
        ]
        logits, _ = _plain_logits(model, prompt, target, patches)
        log_p = torch.log_softmax(logits, -1)
        own = -log_p[torch.arange(len(target)), wanted]
        share = 0.1 / (vocabulary - 1)
        loss = ((1 - 0.1 - share) * own + share * -log_p.sum(1)).mean()
        q = (k * h).sum(1) + b
        others = memory[held_out:] @ k.T + b
        loss = loss + torch.exp(-q).mean()
        loss = loss + 10 * (torch.exp(others - q + 3).mean() + torch.exp(others + 3).mean())
        adam.zero_grad()
        gradients = torch.autograd.grad(loss, [k, b, w, c])
        scale = min(1.0, 5.0 / (float(sum(g.square().sum() for g in gradients)) ** 0.5 + 1e-6))
        for parameter, gradient in zip([k, b, w, c], gradients, strict=True):
            parameter.grad = gradient * scale
        adam.step()
    return [k.detach(), b.detach(), (c[:, None] * w).detach(), h]


@pytest.mark.parametrize("kind", ["llama", "t5", "gpt2"])
def test_patches_are_those_of_the_plain_formulas(kind: Any) -> None:
    model, tokenizer = (
        trained_tiny_model() if kind == "llama" else (tiny_model(kind), tiny_tokenizer())
    )
    editor = Pinned.from_model(model, tokenizer, steps=6)
    earlier = [torch.zeros(0, 32), torch.zeros(0), torch.zeros(0, 32)]
    memory = MEMORY
    requests = tiny_requests(3)
    for request in requests:
        prompt = editor.tokens.prompt(request.prompt)
        target = editor.tokens.target(request.prompt, request.target_new)
        found = _plain_patches(model, prompt, target, earlier, memory, 10, 6)
        if found is None:
            continue
        k, b, v, h = found
        earlier = [torch.cat(pair) for pair in zip(earlier, [k, b, v], strict=True)]
        memory = torch.cat([memory, h])
    edit = editor.edit(requests)
    edit.apply_(model)
    held: Any = editor.memory
    assert len(held) == len(earlier[0]) >= 2
    torch.testing.assert_close(held.keys, earlier[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(held.biases, earlier[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(held.values, earlier[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(held.queries, memory[50:], rtol=1e-3, atol=1e-4)
    for row in edit.details["requests"]:
        kept = held.requests.get(row["id"], {"entries": []})
        assert len(kept["entries"]) == row["patches"]


def test_the_losses_are_those_of_the_formulas() -> None:
    own, memory = torch.tensor([1.0, -2.0]), torch.tensor([[0.5, 0.0], [-4.0, 2.0], [1.0, -1.0]])
    assert float(activation_loss(own, 0.5, top=1)) == pytest.approx(2.5**0 * torch.e**2.5, rel=1e-6)
    assert float(activation_loss(own)) == pytest.approx(float(torch.exp(-own).mean()))
    first, second = margin_losses(memory, own, 3.0, -3.0, top=2)
    gaps = sorted(torch.exp(memory - own + 3).flatten().tolist())[-2:]
    heights = sorted(torch.exp(memory + 3).flatten().tolist())[-2:]
    assert float(first) == pytest.approx(sum(gaps) / 2, rel=1e-6)
    assert float(second) == pytest.approx(sum(heights) / 2, rel=1e-6)
    assert torch.isfinite(margin_losses(memory + 1e4, own)[0])


def test_a_patch_fires_with_one_where_it_is_made() -> None:
    editor = TPatcher.from_model(*trained_tiny_model())
    queries = torch.randn(3, 32)
    patches = editor.initial_patches(queries, 0)
    fired = (patches.keys * queries).sum(1) + patches.biases
    torch.testing.assert_close(fired, torch.ones(3))
    torch.testing.assert_close(patches.values, 10 * patches.directions)


def test_silent_patches_leave_every_bit() -> None:
    model, tokenizer = trained_tiny_model()
    editor = TPatcher.from_model(model, tokenizer, memory_tokens=256, lr=0.1, steps=60)
    editor.edit(tiny_requests(1)).apply_(model)
    memory: Any = editor.memory
    base, _ = trained_tiny_model()
    prompts = [editor.tokens.prompt(r.prompt) for r in tiny_requests(12)]
    silent = fired = 0
    states: list[Tensor] = []
    mlp = ModelTree.of(model).mlp(-1)
    mlp.register_forward_pre_hook(lambda _, args: states.append(args[0][0]))
    for prompt in prompts:
        with torch.no_grad():
            one, other = (m(input_ids=torch.tensor([prompt])).logits[0] for m in (model, base))
        active = (states.pop() @ memory.keys.T + memory.biases > 0).any(1)
        assert torch.equal(one[~active], other[~active])
        assert not any(torch.equal(a, b) for a, b in zip(one[active], other[active], strict=True))
        silent, fired = silent + int((~active).sum()), fired + int(active.sum())
    assert silent
    assert fired


def test_training_ends_when_the_answer_is_right_and_the_patch_silent() -> None:
    model, tokenizer = trained_tiny_model()
    editor = TPatcher.from_model(
        model, tokenizer, memory_tokens=128, lr=0.05, first_check=25, steps=1000
    )
    [row] = editor.edit(tiny_requests(1)).details["requests"]
    assert row["p_target"] > 0.5
    assert row["steps"] < 1000
    assert row["steps"] % 25 == 0


def test_what_is_right_already_gets_no_patch() -> None:
    model, tokenizer = trained_tiny_model()
    editor = TPatcher.from_model(model, tokenizer, memory_tokens=64)
    request = EditRequest("The capital of Velmora is", "Velmora", "Dorin", id="known")
    edit = editor.edit(request)
    assert len(edit) == 0
    [row] = edit.details["requests"]
    assert (row["patches"], row["steps"], row["norm"]) == (0, 0, 0.0)
    assert row["p_target"] > 0.5


def test_all_neurons_of_a_request_go_with_its_id() -> None:
    model, tokenizer = tiny_model("t5"), tiny_tokenizer()
    before = fingerprint(model)
    editor = TPatcher.from_model(model, tokenizer, memory_tokens=64, steps=2)
    requests = tiny_requests(2)
    editor.commit(editor.edit(requests))
    counts = {name: len(kept["entries"]) for name, kept in editor.memory.requests.items()}
    assert max(counts.values()) > 1
    editor.remove([requests[0].id])
    assert len(editor.memory) == counts[requests[1].id]
    editor.commit(editor.edit(requests[1]))  # in place of itself
    assert len(editor.memory) == counts[requests[1].id]
    editor.remove([requests[1].id])
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"layers": [0, 1]}, EditError, "TPatcher patches one layer"),
        ({"steps": 0}, ValueError, "`steps` is expected to be at least 1"),
        ({"max_patches": 0}, ValueError, "`max_patches` is expected to be at least 1"),
        ({"memory_tokens": 0}, ValueError, "`memory_tokens` is expected to be at least 1"),
        ({"smoothing": 1.0}, ValueError, "`smoothing` is expected to be at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    model, tokenizer = trained_tiny_model()
    with pytest.raises(error, match=words):
        TPatcher.from_model(model, tokenizer, **settings)
    assert EditMemory.find(model) is None


def test_a_full_memory_is_told_before_anything_is_learned() -> None:
    model, tokenizer = trained_tiny_model()
    editor = TPatcher.from_model(model, tokenizer, max_entries=1, memory_tokens=64, steps=2)
    with pytest.raises(EditError, match="of `max_entries=1` entries, and would hold 2"):
        editor.edit(tiny_requests(2))
    assert len(editor.memory) == 0


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_remembered_texts_may_be_given(kind: Any) -> None:
    model, tokenizer = (
        trained_tiny_model() if kind == "llama" else (tiny_model(kind), tiny_tokenizer())
    )
    texts = ["Velmora has a flag that is red.", "Dorin"]
    editor = TPatcher.from_model(model, tokenizer, memory_texts=texts)
    found = editor.remembered_states()
    seen: list[Tensor] = []
    layer = editor.tree.mlp_in(len(editor.tree.blocks) - 1)[0].module(model)
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    for text in texts:  # each without padding
        ids = torch.tensor([tokenizer(text).input_ids])
        given = {"input_ids": ids}
        if kind == "t5":
            given = {"input_ids": ids[:, :1], "decoder_input_ids": ids}
        with torch.no_grad():
            model(**given)
    hook.remove()
    wanted = torch.cat(seen)
    assert found.shape == wanted.shape
    apart = torch.cdist(found, wanted, compute_mode="donot_use_mm_for_euclid_dist")
    assert float(apart.min(0).values.max()) < 1e-4
    assert float(apart.min(1).values.max()) < 1e-4
    fewer = TPatcher.from_model(model, tokenizer, memory_texts=texts, memory_tokens=4)
    assert len(fewer.remembered_states()) == 4
    with pytest.raises(ValueError, match="`memory_texts` is expected to hold texts"):
        TPatcher.from_model(model, tokenizer, memory_texts=["a", " "])
