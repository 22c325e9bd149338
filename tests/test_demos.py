# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The tiny world is consistent, and the tiny model knows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_edit.core.errors import ModelError
from lightning_edit.core.request import LOCALITY_KINDS, PORTABILITY_KINDS, check_requests
from lightning_edit.demos import (
    WORLD,
    models,
    tiny_model,
    tiny_requests,
    tiny_tokenizer,
    trained_tiny_model,
    world_sentences,
)
from tests.train_tiny_model import MIN_PROBABILITY, answer_probabilities, train


def test_every_prompt_has_one_answer() -> None:
    sentences = world_sentences()
    assert len(WORLD) == 24
    assert len({prompt for prompt, _ in sentences}) == len(sentences)


def test_requests() -> None:
    requests = tiny_requests(24)
    check_requests(requests)
    answers = dict(world_sentences())
    assert len({(request.id, request.subject) for request in requests}) == 24
    for request in requests:
        assert answers[request.prompt] == request.target_old != request.target_new
        assert [answers[rephrase] for rephrase in request.rephrases] == [request.target_old] * 2
        assert {probe.kind for probe in request.locality} == set(LOCALITY_KINDS)
        edited = {request.prompt, *request.rephrases, *(p.prompt for p in request.portability)}
        for probe in request.locality:
            assert probe.prompt not in edited
            last_sentence = probe.prompt.rpartition(". ")[2]
            assert answers[last_sentence] == probe.answer
        assert request.portability
    kinds = {probe.kind for request in requests for probe in request.portability}
    assert kinds == {"one_hop", "subject_alias", "inverse"} < set(PORTABILITY_KINDS)


@pytest.mark.parametrize("n", [0, 25])
def test_too_few_or_too_many_requests(n: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 24, but got {n}"):
        tiny_requests(n)


def test_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == tiny_model().config.vocab_size
    text = "The flag of Ivory Bay is green. Ünï – 東京"
    tokens = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(tokens.input_ids) == text
    pieces = [text[start:end] for start, end in tokens.offset_mapping]
    assert pieces[:3] == ["The", " flag", " of"]
    assert "Ivory Bay" in "".join(pieces[3:8])
    assert tokenizer.bos_token is None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    # The space belongs to the word, and the answers are one or several tokens long.
    assert tokenizer.encode("red") != tokenizer.encode(" red")
    lengths = {len(tokenizer.encode(f" {fact.answer}")) for fact in WORLD}
    assert min(lengths) == 1
    assert max(lengths) > 1
    # Training is deterministic, and done once.
    assert models._tokenizer.__wrapped__().get_vocab() == tokenizer.get_vocab()
    tokenizer.add_tokens(["Atlantis"])
    assert "Atlantis" not in tiny_tokenizer().get_vocab()


def test_models_depend_on_the_seed_only() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    made = [models._model.__wrapped__("llama", seed) for seed in (0, 0, 1)]
    weights = [model.lm_head.weight for model in made]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert not tiny_model().training
    assert torch.equal(tiny_model().lm_head.weight, weights[0])


def test_models_do_not_depend_on_what_is_in_force_where_they_are_asked_for_first() -> None:
    made: list[Callable[[], Any]] = [
        lambda: models._model.__wrapped__("gpt2", 0),
        models._trained.__wrapped__,
    ]
    for make in made:
        with torch.inference_mode(), torch.device("meta"):
            model = make()
        assert not any(p.is_meta or p.is_inference() for p in model.parameters())


def test_unknown_kind() -> None:
    with pytest.raises(ModelError, match="llama, gpt2 or t5, but got 'bert'"):
        tiny_model("bert")  # type: ignore[arg-type]


def test_trained_model_answers_the_world() -> None:
    model, tokenizer = trained_tiny_model()
    for prompt, answer in world_sentences():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
        text = tokenizer.decode(out[0, ids.shape[1] :])
        assert text == f" {answer}.<end>", prompt


def test_trained_models_do_not_share_weights() -> None:
    first, _ = trained_tiny_model()
    kept = first.lm_head.weight.detach().clone()
    with torch.no_grad():
        first.lm_head.weight.zero_()
    second, _ = trained_tiny_model()
    assert torch.equal(second.lm_head.weight, kept)
    assert second.lm_head.weight is second.model.embed_tokens.weight


def test_trained_model_is_sure_of_the_world() -> None:
    model, _ = trained_tiny_model()
    assert answer_probabilities(model).min() > 0.94  # trained to 0.95, on whatever processor


def test_a_changed_file_of_weights_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tiny_llama.safetensors").write_bytes(b"changed")
    monkeypatch.setattr(models, "files", lambda package: tmp_path)
    monkeypatch.setattr(models, "_trained", models._trained.__wrapped__)
    with pytest.raises(ModelError, match=r"has the SHA-256 .* published.*install .* again"):
        trained_tiny_model()


@pytest.mark.slow
def test_the_script_trains_a_model_that_is_sure_of_the_world() -> None:
    assert answer_probabilities(train(seed=1)).min() >= MIN_PROBABILITY
