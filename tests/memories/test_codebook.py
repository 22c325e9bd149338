# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A codebook while a model runs: who is answered, where, and for how long."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_edit import GRACE, EditMemory, MemoryWrite
from lightning_edit.core.batch import PromptTokenizer, pad_rows
from lightning_edit.core.locator import Locator
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.evaluation.scoring import continuations, score_targets
from lightning_edit.functional.codebook import Replacement
from tests.modules.helpers import snapshot
from tests.processes import run_process

WHERE: list[Replacement] = ["last", "prompt", "all"]


def _edited(where: Replacement = "last", kind: Any = "llama", **settings: Any) -> Any:
    model, tokenizer = (
        trained_tiny_model() if kind == "llama" else (tiny_model(kind), tiny_tokenizer())
    )
    defaults = {"layers": [2], "steps": 30, "radius": 0.01, "replacement": where}
    editor = GRACE.from_model(model, tokenizer, **{**defaults, **settings})
    editor.edit(tiny_requests(2)).apply_(model)
    return editor


def _logits(model: Any, rows: Sequence[Sequence[int]], side: str = "left") -> list[Tensor]:
    """Logits of all tokens of each row."""
    ids, mask = pad_rows(rows, 0, side=side)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return [row[m.bool()] for row, m in zip(logits, mask, strict=True)]


@pytest.mark.parametrize("where", WHERE)
def test_a_prompt_out_of_every_scope_is_answered_by_the_base_itself(where: Replacement) -> None:
    editor = _edited(where)
    tokens: PromptTokenizer = editor.tokens
    inside, outside = (tokens.prompt(r.prompt) for r in tiny_requests(4)[::3])
    base, _ = trained_tiny_model()
    [one, other], [base_one, base_other] = (
        _logits(m, [inside, outside]) for m in (editor.model, base)
    )
    assert torch.equal(other, base_other)
    assert not torch.equal(one, base_one)
    # Only outside prompts: not even a copy is made.
    assert torch.equal(_logits(editor.model, [outside])[0], _logits(base, [outside])[0])
    with editor.memory.off():
        assert torch.equal(_logits(editor.model, [inside])[0], _logits(base, [inside])[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_query(side: str) -> None:
    editor = _edited()
    rows = [editor.tokens.prompt(r.prompt) for r in tiny_requests(2)]
    rows.append([*rows[0], *rows[1]])
    assert len({len(row) for row in rows}) > 1
    for row, found in zip(rows, _logits(editor.model, rows, side), strict=True):
        torch.testing.assert_close(found, _logits(editor.model, [row])[0], rtol=1e-4, atol=1e-4)


def _by_full_passes(editor: Any, prompt: str, count: int) -> list[int]:
    """Greedy tokens without a cache, the query held at the end of the prompt."""
    ids: list[int] = editor.tokens.prompt(prompt)
    start = len(ids)
    for _ in range(count):
        with torch.no_grad(), editor.memory.prompts_of([start]):
            logits = editor.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids = [*ids, int(logits.argmax())]
    return ids[start:]


@pytest.mark.parametrize("where", WHERE)
def test_a_route_is_decided_once_and_kept_while_tokens_are_generated(where: Replacement) -> None:
    editor = _edited(where, radius=1.0)
    prompts = [r.prompt for r in tiny_requests(4)]
    wanted = [_by_full_passes(editor, prompt, 6) for prompt in prompts]
    ids, mask = pad_rows([editor.tokens.prompt(p) for p in prompts], 0, side="left")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = editor.model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    forbidden = editor.tokens.eos_id  # `min_new_tokens` keeps the end token out
    for row, other in zip(found.tolist(), wanted, strict=True):
        end = other.index(forbidden) if forbidden in other else len(other)
        assert row[:end] == other[:end]
    beams = editor.model.generate(ids, attention_mask=mask, num_beams=3, **settings)
    assert beams.shape == (4, ids.shape[1] + 6)
    assert not len(editor.memory.router._kept)  # gone with the caches


@pytest.mark.parametrize("where", WHERE)
def test_teacher_forced_scores_keep_the_route_over_answers(where: Replacement) -> None:
    editor = _edited(where, radius=1.0)
    requests = tiny_requests(6)
    pairs = [
        (editor.tokens.prompt(r.prompt), editor.tokens.target(r.prompt, r.target_new))
        for r in requests
    ]
    assert any(len(target) > 2 for _, target in pairs)
    for (prompt, target), score in zip(
        pairs, score_targets(editor.model, editor.tokens, pairs, max_tokens=24), strict=True
    ):
        with torch.no_grad(), editor.memory.prompts_of([len(prompt)]):
            logits = editor.model(input_ids=torch.tensor([[*prompt, *target]])).logits[0]
        wanted = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        wanted = wanted.gather(1, torch.tensor(target)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(score.log_probs), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_an_encoder_decoder_is_asked_once_a_prompt(stack: Any) -> None:
    editor = _edited(kind="t5", stack=stack, steps=60, lr=3.0, radius=0.05)
    base = tiny_model("t5")
    layer = Locator([2], stack=stack).sites(editor.model)[0].module(editor.model)
    asked: list[int] = []
    memory: Any = editor.memory
    lookup = memory.lookup

    def counted(queries: Tensor) -> Any:
        asked.append(len(queries))
        return lookup(queries)

    memory.lookup = counted
    assert layer._forward_hooks
    inside, outside = tiny_requests(2)[0].prompt, "Which river has Marpeth?"
    said = continuations(editor.model, editor.tokens, [inside, outside], max_new_tokens=5)
    assert asked == [2]
    before = continuations(base, editor.tokens, [inside, outside], max_new_tokens=5)
    assert said[1] == before[1]
    assert said[0] != before[0]


def test_the_state_dict_brings_the_memory_along() -> None:
    editor = _edited()
    other = GRACE.from_model(*trained_tiny_model(), layers=[2], radius=0.01)
    assert len(other.memory) == 0
    other.load_state_dict(editor.state_dict(), strict=False)
    assert other.memory.requests == editor.memory.requests
    prompt = editor.tokens.prompt(tiny_requests(1)[0].prompt)
    assert torch.equal(_logits(other.model, [prompt])[0], _logits(editor.model, [prompt])[0])
    # And a smaller one in place of a larger.
    MemoryWrite.removing(other.model, [tiny_requests(1)[0].id]).apply_(other.model)
    editor.load_state_dict(other.state_dict(), strict=False)
    assert len(editor.memory) == 1


def _say_again(folder: Path) -> None:
    """Prints what the trained model says with an edit out of a folder."""
    model, tokenizer = trained_tiny_model()
    MemoryWrite.load(folder).apply_(model)
    prompts = [r.prompt for r in tiny_requests(4)]
    said = [c.text for c in continuations(model, PromptTokenizer(tokenizer), prompts)]
    sys.stdout.write(json.dumps(said))


def test_another_process_says_the_same(tmp_path: Path) -> None:
    editor = _edited()
    model = editor.model
    prompts = [r.prompt for r in tiny_requests(4)]
    said = [c.text for c in continuations(model, editor.tokens, prompts)]
    edit = MemoryWrite.from_state({}, model)
    edit.save(tmp_path / "edit")
    done = run_process(_say_again, tmp_path / "edit")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == said


def test_keys_far_from_the_origin_are_told_apart() -> None:
    from lightning_edit.functional.codebook import nearest_keys

    keys = 1000.0 + torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    distances, indices = nearest_keys(keys, keys)
    assert torch.equal(indices, torch.arange(40))
    assert torch.equal(distances, torch.zeros(40))


def test_the_weights_and_their_gradients_are_left_alone() -> None:
    editor = _edited()
    base, _ = trained_tiny_model()
    kept = snapshot(base)
    assert all(torch.equal(p, kept[name]) for name, p in editor.model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in editor.model.parameters())
    assert isinstance(EditMemory.find(editor.model), EditMemory)
