# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""IKE and SCR: which facts are told, in which words, and that the model is asked so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_edit import IKE, SCR, EditMemory, EditRequest, MemoryWrite, Probe
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import ModelError, RequestError
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.evaluation.scoring import continuations
from lightning_edit.modules.memory_based.ike import demonstration_kinds
from tests.memories.sentence_models import save_encoder
from tests.modules.helpers import plain_nll


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six facts of the tiny world, the last one without rephrases and probes."""
    *facts, last = tiny_requests(6)
    bare = EditRequest(last.prompt, last.subject, last.target_new, id=last.id)
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps(fact.to_dict()) for fact in (*facts, bare)]
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a text encoder, with random weights."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def _plain_embedding(model: Any, tokenizer: Any, text: str, *, block: int = 1) -> Tensor:
    """Mean state behind a block: a language model's first sixth of a few is its first."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        part = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        found = part(input_ids=ids, output_hidden_states=True)
    mean: Tensor = found.hidden_states[block][0].mean(0)
    unit: Tensor = mean / mean.norm()
    return unit


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_nearest_facts_are_told_the_most_fitting_last(kind: Any) -> None:
    model, tokenizer = (
        trained_tiny_model() if kind == "llama" else (tiny_model(kind), tiny_tokenizer())
    )
    editor = SCR.from_model(model, tokenizer, facts=2)
    requests = tiny_requests(5)
    editor.edit(requests).apply_(model)
    prompts = ["Velmora has its capital in", "Which river has Dorin?", requests[2].prompt]
    embedded = torch.stack([_plain_embedding(model, tokenizer, r.prompt) for r in requests])
    for prompt, asked in zip(prompts, editor.memory.rewrite(prompts, editor.tokens), strict=True):
        cosines = (embedded @ _plain_embedding(model, tokenizer, prompt)).tolist()
        second, first = sorted(range(5), key=cosines.__getitem__)[-2:]
        told = [
            f"New Fact: {r.prompt} {r.target_new}\n" for r in (requests[second], requests[first])
        ]
        assert asked == "".join(told) + f"Prompt: {prompt}"
    with editor.memory.off():
        assert editor.memory.rewrite(prompts, editor.tokens) == prompts


def test_a_prompt_like_no_fact_is_left_as_it_is() -> None:
    model, tokenizer = trained_tiny_model()
    first, second, *_ = tiny_requests(2)
    a, b = (_plain_embedding(model, tokenizer, r.prompt) for r in (first, second))
    editor = SCR.from_model(model, tokenizer, threshold=float(a @ b) + 1e-3)
    assert editor.memory.rewrite([first.prompt], editor.tokens) == [first.prompt]  # none yet
    editor.edit(first).apply_(model)
    asked = editor.memory.rewrite([first.prompt, second.prompt], editor.tokens)
    assert asked[0].startswith("New Fact: ")
    assert asked[1] == second.prompt
    editor.remove([first.id])
    assert editor.memory.rewrite([first.prompt], editor.tokens) == [first.prompt]


def test_the_metrics_ask_in_these_words() -> None:
    model, tokenizer = trained_tiny_model()
    plain, _ = trained_tiny_model()
    editor = SCR.from_model(model, tokenizer)
    request = tiny_requests(1)[0]
    evaluator = editor.evaluator
    baseline = evaluator.baseline([request])
    edit = editor.edit(request)
    with edit.applied(model):
        found = evaluator.evaluate([request], baseline).probes
        prompts = [probe.prompt for probe in found]
        asked = editor.memory.rewrite(prompts, editor.tokens)
    tokens = PromptTokenizer(tokenizer)
    # Answers of which metrics await more than one sentence may go on behind a full stop.
    said = [c.text for c in continuations(plain, tokens, asked, min_new_tokens=[1] * len(asked))]
    for probe, text, prompt in zip(found, said, asked, strict=True):
        assert probe.text.startswith(text)
        if probe.nll_new is not None and probe.metric != "locality":
            is_own = probe.metric == "portability"
            target = tokens.target(prompt, probe.answers[0] if is_own else request.target_new)
            nll = torch.stack(plain_nll(plain, tokens.prompt(prompt), target)).detach().mean()
            assert probe.nll_new == pytest.approx(float(nll), rel=1e-4)
    row = edit.details["requests"][0]
    assert row["loss"] == pytest.approx(found[0].nll_new, rel=1e-4)
    assert row["p_target"] == pytest.approx(math.exp(-row["loss"]))
    assert row["prompt_tokens"] == len(tokens.prompt(asked[0]))


@pytest.mark.parametrize("nearest_last", [True, False])
def test_demonstrations_are_those_of_the_nearest_facts(corpus: Path, nearest_last: bool) -> None:
    model, tokenizer = trained_tiny_model()
    editor = IKE.from_model(
        model, tokenizer, corpus=str(corpus), count=4, ratio=[1, 2, 2], nearest_last=nearest_last
    )
    request = EditRequest("The capital of Velmora is", "Velmora", "Nimbus", id="mine")
    facts = [f for f in tiny_requests(6) if f.subject != "Velmora"]

    def query(r: EditRequest) -> str:
        return f"New Fact: {r.prompt} {r.target_new}\nPrompt: {r.prompt}"

    mine = _plain_embedding(model, tokenizer, query(request))
    facts.sort(key=lambda f: -float(mine @ _plain_embedding(model, tokenizer, query(f))))
    kinds = demonstration_kinds(4, (1, 2, 2))
    shown = []
    for i, (fact, kind) in enumerate(zip(facts, kinds, strict=False)):
        prompt, answer = fact.prompt, fact.target_new
        if fact.id != tiny_requests(6)[-1].id:
            if kind == "update":
                prompt = fact.rephrases[i % 2]
            elif kind == "retain":  # the distracting probe is left out
                probe = [p for p in fact.locality if p.kind != "distracting"][i % 3]
                prompt, answer = probe.prompt, probe.answer
        told = f"New Fact: {fact.prompt} {fact.target_new}\n"
        shown.append(f"{told}Prompt: {prompt} {answer}\n\n")
    [context] = editor.contexts([request])
    assert context == "".join(shown[::-1] if nearest_last else shown)
    editor.edit(request).apply_(model)
    [asked] = editor.memory.rewrite([request.prompt], editor.tokens)
    assert asked == context + query(request)
    for other in tiny_requests(1):
        assert other.subject not in context


def test_a_corpus_that_holds_too_few_facts_is_told(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps(r.to_dict()) for r in tiny_requests(3)))
    editor = IKE.from_model(*trained_tiny_model(), corpus=str(corpus), count=8)
    with pytest.warns(UserWarning, match=r"`count` is 8, of which `corpus=.* can give 1: facts"):
        [context] = editor.contexts(tiny_requests(1))
    assert context.count("New Fact:") == 1


def test_the_shares_of_the_kinds_are_kept() -> None:
    kinds = demonstration_kinds(32, (1, 3, 4))
    assert [kinds.count(kind) for kind in ("copy", "update", "retain")] == [4, 12, 16]
    assert demonstration_kinds(3, (0, 0, 1)) == ["retain"] * 3


def test_a_text_encoder_out_of_a_folder_finds_facts(encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    model, tokenizer = trained_tiny_model()
    editor = SCR.from_model(model, tokenizer, encoder=str(encoder))
    requests = tiny_requests(3)
    editor.edit(requests).apply_(model)
    plain = AutoModel.from_pretrained(encoder).eval()
    wanted = [_plain_embedding(plain, tokenizer, r.prompt, block=-1) for r in requests]
    torch.testing.assert_close(
        editor.memory.get_buffer("embeddings"), torch.stack(wanted), rtol=1e-4, atol=1e-5
    )
    # A file is enough, elsewhere.
    editor.committed().save(tmp_path / "edit")
    other, _ = trained_tiny_model()
    MemoryWrite.load(tmp_path / "edit").apply_(other)
    memory = EditMemory.find(other)
    assert memory is not None
    prompts = ["Which language has Velmora?", requests[2].prompt]
    asked = memory.rewrite(prompts, editor.tokens)
    assert asked == editor.memory.rewrite(prompts, editor.tokens)
    assert asked[1].startswith(f"New Fact: {requests[2].prompt}")


def test_the_packaged_facts_are_the_corpus_by_default() -> None:
    editor = IKE.from_model(*trained_tiny_model(), count=2)
    request = EditRequest("The capital of {} is", "France", "Lyon", locality=(Probe("a", "b"),))
    [context] = editor.contexts([request])
    assert context.count("New Fact: ") == 2
    assert "France" not in context.split("\n")[0]


@pytest.mark.parametrize(
    ("cls", "settings", "words"),
    [
        (IKE, {"count": -1}, "`count` is expected to be at least 0"),
        (IKE, {"ratio": [1, 2]}, "`ratio` is expected to be three shares"),
        (IKE, {"ratio": [0, 0, 0]}, "`ratio` is expected to be three shares"),
        (SCR, {"facts": 0}, "`facts` is expected to be at least 1"),
        (SCR, {"threshold": 1.0}, "`threshold` is expected to be a cosine"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    cls: Any, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        cls(**settings)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    for content, words in (
        (None, r"`corpus=.*cannot be read .*Give a file of edit requests"),
        ("\n", "holds no facts to demonstrate with"),
        ("{", "line 1 is no JSON"),
        ('{"prompt": "x"}', "line 1: the field `target_new` is missing"),
    ):
        if content is not None:
            path.write_text(content)
        editor = IKE.from_model(*trained_tiny_model(), corpus=str(path))
        with pytest.raises(RequestError, match=words):
            editor.edit(tiny_requests(1))
        assert len(editor.memory) == 0
    with pytest.raises(ModelError, match="cannot be loaded as a text encoder"):
        SCR.from_model(*trained_tiny_model(), encoder=str(tmp_path / "none"))
