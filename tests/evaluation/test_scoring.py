# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Batched scores and texts equal those of one row at a time, without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.demos import (
    tiny_requests,
    tiny_tokenizer,
    trained_tiny_model,
    world_sentences,
)
from lightning_edit.evaluation import greedy, scoring
from lightning_edit.evaluation.scoring import continuations, score_targets
from lightning_edit.passes import prefixes
from tests import zoo


def pairs_of(tokens: PromptTokenizer, count: int = 6) -> list[tuple[list[int], list[int]]]:
    prompts = ["The capital of Velmora is", "People in Ostrane speak", "Dorin has a flag that is"]
    answers = ["Dorin", "Ivory Bay", "green", "Kettleby", "Ostrish", "a"]
    return [
        (tokens.prompt(prompts[i % 3] + " the" * (i % 2)), tokens.target("x", answers[i]))
        for i in range(count)
    ]


def alone(model: Any, prompt: list[int], target: list[int]) -> torch.Tensor:
    """Log-probabilities of every place of one answer, from one unpadded row."""
    if model.config.is_encoder_decoder:
        logits = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([target])).logits[0]
    else:
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0]
        logits = logits[len(prompt) - 1 : len(prompt) - 1 + len(target)]
    return torch.log_softmax(logits.float(), -1)


@pytest.mark.parametrize("kind", [*zoo.DECODERS, *zoo.ENCODER_DECODERS])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_scores_equal_single_rows(kind: str, side: str) -> None:
    model = zoo.build(kind)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    tokens = PromptTokenizer(tokenizer, is_encoder_decoder=model.config.is_encoder_decoder)
    pairs = pairs_of(tokens)
    scores = score_targets(model, tokens, pairs, with_first=[True] * len(pairs))
    with torch.no_grad():
        for (prompt, target), score in zip(pairs, scores, strict=True):
            wanted = alone(model, prompt, target)
            picked = wanted.gather(1, torch.tensor(target)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(score.log_probs), picked, atol=2e-5, rtol=1e-4)
            assert score.argmax == tuple(wanted.argmax(-1).tolist())
            assert score.nll == pytest.approx(-picked.mean().item(), rel=1e-4)
            assert score.first is not None
            torch.testing.assert_close(score.first, wanted[0], atol=2e-5, rtol=1e-4)


def test_equal_rows_are_run_once() -> None:
    model = zoo.build("llama")
    tokens = PromptTokenizer(tiny_tokenizer())
    prompt = tokens.prompt("The capital of Velmora is")
    one_token = [tokens.target("x", word)[:1] for word in ("Dorin", "green", "red")]
    seen: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    scores = score_targets(model, tokens, [(prompt, target) for target in one_token])
    handle.remove()
    assert seen == [1]
    assert [score.target for score in scores] == [tuple(target) for target in one_token]


def test_small_batches_change_nothing() -> None:
    model = zoo.build("gpt2")
    tokens = PromptTokenizer(tiny_tokenizer())
    pairs = pairs_of(tokens)
    whole = score_targets(model, tokens, pairs)
    parts = score_targets(model, tokens, pairs, max_tokens=1)
    for a, b in zip(whole, parts, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=2e-5)


@pytest.mark.parametrize("kind", zoo.DECODERS)
def test_answers_go_on_from_prompts_of_several_batches(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.build(kind)
    tokens = PromptTokenizer(tiny_tokenizer())
    words = ["Velmora", "green", "Kettleby", "Ivory Bay", "Ostrane"]
    pairs = [
        (tokens.prompt("The capital of Velmora is" + " the" * n), tokens.target("x", word + tail))
        for n, word in enumerate(words)
        for tail in ("", " has a flag", " has")
    ]
    whole = score_targets(model, tokens, pairs)
    # Each prompt by itself, all of their answers together, and answers in many small batches.
    for enough in (4, 10**6):
        monkeypatch.setattr(scoring, "ENOUGH_TOKENS", enough)
        for a, b in zip(whole, score_targets(model, tokens, pairs, max_tokens=24), strict=True):
            assert a.log_probs == pytest.approx(b.log_probs, abs=2e-5)
            assert a.argmax == b.argmax


def test_prompts_are_read_once_for_all_their_answers() -> None:
    model = zoo.build("llama")
    tokens = PromptTokenizer(tiny_tokenizer())
    prompt = tokens.prompt("The capital of Velmora is")
    targets = [tokens.target("x", text) for text in ("Dorin", "Ivory Bay", "Ostrane has a flag")]
    read: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    score_targets(model, tokens, [(prompt, target) for target in targets])
    handle.remove()
    longer = [target[:-1] for target in targets if len(target) > 1]
    assert read == [len(prompt), len(longer) * max(map(len, longer))]


def test_continuations_give_what_the_world_says() -> None:
    model, tokenizer = trained_tiny_model()
    tokens = PromptTokenizer(tokenizer)
    facts = [(p, answer) for p, answer in world_sentences() if p.startswith("The capital of")]
    prompts = [prompt for prompt, _ in facts]
    texts = continuations(model, tokens, prompts)
    assert all(t.text.startswith(answer) for t, (_, answer) in zip(texts, facts, strict=True))
    assert continuations(model, tokens, prompts[:1]) == texts[:1]  # alone as in a batch


def test_half_precision_scores_are_finite_and_close() -> None:
    model, tokenizer = trained_tiny_model()
    tokens = PromptTokenizer(tokenizer)
    pairs = pairs_of(tokens)
    exact = score_targets(model, tokens, pairs)
    rough = score_targets(model.to(torch.bfloat16), tokens, pairs)
    for a, b in zip(exact, rough, strict=True):
        assert b.nll == pytest.approx(a.nll, rel=0.1, abs=0.1)


@pytest.mark.parametrize("kind", zoo.DECODERS)
def test_what_prompts_begin_with_is_read_once_and_changes_nothing(kind: str) -> None:
    model = zoo.build(kind)
    tokens = PromptTokenizer(tiny_tokenizer())
    told = [tokens.prompt("The capital of Velmora is Dorin . " * n) for n in (12, 13, 14)]
    pairs = [
        (start[:length] + tokens.prompt(asked), tokens.target("x", answer))
        for start, length in zip(told, (80, 90, 70), strict=True)
        for asked in ("People in Ostrane speak", "The flag is", "a")
        for answer in ("Dorin", "Ivory Bay", "green")
    ]
    tokens_read = 0

    def count(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal tokens_read
        tokens_read += (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()

    handle = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    scores = score_targets(model, tokens, pairs, with_first=[True] * len(pairs))
    handle.remove()
    assert tokens_read < sum(len(prompt) for prompt, _ in pairs) / 4
    with torch.no_grad():
        for (prompt, target), score in zip(pairs, scores, strict=True):
            wanted = alone(model, prompt, target)
            picked = wanted.gather(1, torch.tensor(target)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(score.log_probs), picked, atol=2e-5, rtol=1e-4)
            assert score.first is not None
            torch.testing.assert_close(score.first, wanted[0], atol=2e-5, rtol=1e-4)


def test_texts_go_on_from_what_their_prompts_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = trained_tiny_model()
    tokens = PromptTokenizer(tokenizer)
    told = " ".join(f"{prompt} {answer}." for prompt, answer in world_sentences()[:16])
    prompts = [f"{told} {asked}" for asked in ("The capital of Velmora is", "People in", "Dorin")]
    read: list[int] = []
    handle = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    texts = continuations(model, tokens, [*prompts, "Velmora"], max_new_tokens=5)
    shared = sum(read)
    read.clear()
    monkeypatch.setattr(prefixes, "SHORTEST", 10**6)
    assert continuations(model, tokens, [*prompts, "Velmora"], max_new_tokens=5) == texts
    handle.remove()
    assert shared < 0.6 * sum(read)
    assert len({text.text for text in texts}) > 1


@pytest.mark.parametrize("shared", [False, True])
def test_rows_that_have_ended_are_left_out_and_nothing_changes(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = trained_tiny_model()
    tokens = PromptTokenizer(tokenizer)
    prompts = [request.prompt for request in tiny_requests(8)] + ["The", "In a", "Nobody knows"]
    if shared:
        monkeypatch.setattr(prefixes, "SHORTEST", 2)
        prompts = [f"{tiny_requests(1)[0].prompt} {prompt}" for prompt in prompts]
    monkeypatch.setattr(greedy, "STAGE", 99)
    whole = continuations(model, tokens, prompts, max_new_tokens=12)
    assert len({len(said.ids) for said in whole}) > 2
    rows: list[int] = []

    def count(_: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(kwargs["input_ids"]))

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    for stage in (3, 4):
        monkeypatch.setattr(greedy, "STAGE", stage)
        rows.clear()
        assert continuations(model, tokens, prompts, max_new_tokens=12) == whole
        assert max(rows) > rows[-1]
    hook.remove()
