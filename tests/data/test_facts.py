# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The fact set keeps what its documentation promises, and the model knows what is recorded."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_edit.data
from lightning_edit.core.request import EditRequest, Probe, check_requests

DATA = Path(lightning_edit.data.__file__).parent
DOCS = Path(__file__).parents[2] / "docs" / "facts.md"
FACTS = [
    EditRequest.from_dict(json.loads(line), f"facts.jsonl:{number}")
    for number, line in enumerate((DATA / "facts.jsonl").read_text("utf-8").splitlines(), 1)
]
BY_ID = {request.id: request for request in FACTS}
KNOWN: dict[str, list[str]] = json.loads((DATA / "facts_known.json").read_text("utf-8"))


def _locality(request: EditRequest, kind: str) -> list[Probe]:
    return [probe for probe in request.locality if probe.kind == kind]


def _template(request: EditRequest) -> str:
    return request.prompt.replace(request.subject, "{}", 1)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def test_enough_facts_and_relations() -> None:
    assert len(FACTS) >= 120
    assert len(BY_ID) == len(FACTS)
    check_requests(FACTS)
    assert len({_template(request) for request in FACTS}) >= 12
    kinds = Counter(probe.kind for request in FACTS for probe in request.portability)
    assert set(kinds) == {"one_hop", "subject_alias", "inverse"}
    assert min(kinds.values()) >= 30
    assert any(request.is_question for request in FACTS)


def test_the_edit_itself(subtests: pytest.Subtests) -> None:
    for request in FACTS:
        with subtests.test(request.id):
            assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", request.id)
            assert request.target_old
            assert _words(request.target_old) != _words(request.target_new)
            assert len(request.target_new.split()) <= 3
            for text in (request.prompt, request.target_old, request.target_new):
                assert text == text.strip()


def test_rephrases_name_the_subject_and_leave_the_answer_open(subtests: pytest.Subtests) -> None:
    for request in FACTS:
        with subtests.test(request.id):
            assert len({*request.rephrases} - {request.prompt}) >= 2
            for rephrase in request.rephrases:
                assert request.subject in rephrase
                assert rephrase.endswith("?") == request.is_question
                assert request.target_new not in rephrase
                assert rephrase == rephrase.strip()


def test_neighbors_share_the_relation_but_not_the_new_answer(subtests: pytest.Subtests) -> None:
    for request in FACTS:
        with subtests.test(request.id):
            neighbors = _locality(request, "neighborhood")
            assert len({probe.prompt for probe in neighbors}) == len(neighbors) >= 3
            head, _, tail = _template(request).partition("{}")
            for probe in neighbors:
                assert probe.prompt.startswith(head)
                assert probe.prompt.endswith(tail)
                assert request.subject not in probe.prompt
                assert _words(probe.answer)
                assert _words(probe.answer) != _words(request.target_new)


def test_distracting_probes_state_the_new_fact_first(subtests: pytest.Subtests) -> None:
    for request in FACTS:
        with subtests.test(request.id):
            probes = _locality(request, "distracting")
            assert probes
            head = _template(request).partition("{}")[0]
            for probe in probes:
                stated, _, question = probe.prompt.partition(f" {request.target_new}. ")
                assert request.subject in stated
                assert question.startswith(head)
                assert request.subject not in question
                assert _words(probe.answer)
                assert _words(probe.answer) != _words(request.target_new)


def test_unrelated_probes_are_about_something_else(subtests: pytest.Subtests) -> None:
    for request in FACTS:
        with subtests.test(request.id):
            assert _locality(request, "unrelated")
            for probe in _locality(request, "unrelated"):
                assert not {*_words(request.subject)} - {"the", "of", "a"} & {*_words(probe.prompt)}
                assert probe.answer


def test_portability_probes_ask_for_what_follows(subtests: pytest.Subtests) -> None:
    for request in FACTS:
        with subtests.test(request.id):
            assert request.portability
            for probe in request.portability:
                named = [request.subject in text for text in (probe.prompt, *probe.answers)]
                if probe.kind == "one_hop":
                    assert named[0]
                    assert request.target_new not in probe.answers
                elif probe.kind == "subject_alias":
                    assert not named[0]
                    assert probe.answer == request.target_new
                else:
                    assert not named[0]
                    assert request.target_new in probe.prompt
                    assert any(answer in request.subject for answer in probe.answers)


def test_all_facts_can_be_edited_together() -> None:
    # A neighbor that is edited too has no answer that must stay; an inverse with two has none.
    edited = {text for request in FACTS for text in (request.prompt, *request.rephrases)}
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for request in FACTS:
        for probe in request.locality:
            assert not any(probe.prompt.endswith(text) for text in edited), probe.prompt
        for probe in request.portability:
            assert probe.prompt not in edited
            answers[probe.prompt].add(probe.answer)
    assert [prompt for prompt, found in answers.items() if len(found) > 1] == []


def test_recorded_ids() -> None:
    assert set(KNOWN) == {"smollm2", "demo"}
    for ids in KNOWN.values():
        assert len(set(ids)) == len(ids)
        assert set(ids) <= set(BY_ID)
    assert not any(BY_ID[id_].is_question for id_ in KNOWN["smollm2"])


def test_demo_edits_are_diverse_and_do_not_meet() -> None:
    demo = [BY_ID[id_] for id_ in KNOWN["demo"]]
    assert len(demo) == 10
    assert set(KNOWN["demo"]) <= set(KNOWN["smollm2"])
    assert max(Counter(map(_template, demo)).values()) <= 2
    for request in demo:
        for other in demo:
            texts = [*other.rephrases, *(probe.prompt for probe in other.locality)]
            assert other is request or not any(request.subject in text for text in texts)


def test_documented_relations() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|.*\| (\d+) \| (\d+) \|$", DOCS.read_text("utf-8"), re.M)
    names = sorted((name for name, *_ in rows), key=len, reverse=True)

    def count(ids: Iterable[str]) -> Counter[str]:
        return Counter(next(n for n in names if id_.startswith(f"{n}-")) for id_ in ids)

    all_facts, known = count(BY_ID), count(KNOWN["smollm2"])
    assert [(n, int(a), int(k)) for n, a, k in rows] == [
        (n, all_facts[n], known[n]) for n in dict.fromkeys(n for n, *_ in rows)
    ]


@torch.no_grad()
def _continuations(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> dict[str, str]:
    by_length: defaultdict[int, list[tuple[str, list[int]]]] = defaultdict(list)
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        by_length[len(ids)].append((prompt, ids))
    texts = {}
    for batch in by_length.values():
        step = torch.tensor([ids for _, ids in batch])
        cache, written = None, []
        for _ in range(tokens):
            out = model(step, cache=cache, use_cache=True)
            cache, step = out.cache, out.logits[:, -1].argmax(-1, keepdim=True)
            written.append(step)
        for (prompt, _), row in zip(batch, torch.cat(written, 1), strict=True):
            texts[prompt] = tokenizer.decode(row)
    return texts


@pytest.mark.real
@pytest.mark.slow
def test_the_default_model_knows_what_is_recorded(default_model: tuple[Any, Any]) -> None:
    model, tokenizer = default_model
    open_ended = [request for request in FACTS if not request.is_question]
    texts = _continuations(model, tokenizer, [request.prompt for request in open_ended], 10)
    found = [
        request.id
        for request in open_ended
        if re.match(rf"\s*{re.escape(str(request.target_old))}(?!\w)", texts[request.prompt])
    ]
    assert found == KNOWN["smollm2"]
    assert len(found) >= 60
    for request in FACTS:
        assert len(tokenizer(f" {request.target_new}").input_ids) <= 3
    for id_ in KNOWN["demo"]:
        assert not texts[BY_ID[id_].prompt].lstrip().startswith(BY_ID[id_].target_new)
