# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Every editor that remembers answers the same elsewhere, from files alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_edit import Edit, EditMemory
from lightning_edit.artifacts import apply
from lightning_edit.core.batch import IGNORE_INDEX, PromptTokenizer, pad_rows
from lightning_edit.core.errors import EditError
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.evaluation.harness import log_likelihoods
from lightning_edit.evaluation.scoring import continuations, prompt_ids, score_targets
from lightning_edit.models import load_model, load_tokenizer
from lightning_edit.modules.memory_based.base import MemoryModule
from tests.contract.enumeration import EDITORS, RememberingEditor, quick, quick_editor
from tests.processes import run_process

REMEMBERING = [name for name, cls in EDITORS.items() if issubclass(cls, MemoryModule)]
REMEMBERING.append(RememberingEditor.__name__)
# Those that decide by a whole prompt, and so need to be told where it ends.
BY_PROMPT = {"SERAC", "WISE"}


def answers(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """What a model says, and the log-probabilities that it gives new answers."""
    tokens = PromptTokenizer(tokenizer)
    requests = tiny_requests(3)
    prompts = [text for r in requests for text in (r.prompt, *r.rephrases[:1])]
    pairs = [(tokens.prompt(r.prompt), tokens.target(r.prompt, r.target_new)) for r in requests]
    return {
        "texts": [written.text for written in continuations(model, tokens, prompts)],
        "scores": [list(score.log_probs) for score in score_targets(model, tokens, pairs)],
    }


def elsewhere(folder: Path) -> None:
    """Prints what models say that get their edits from the folders in a folder.

    Of each edit once put into a model by hand, and once written into a folder by ``apply``.
    """
    tokenizer = load_tokenizer(str(folder / "model"))
    said = {}
    for edit in sorted((folder / "edits").iterdir()):
        model = load_model(str(folder / "model"))
        Edit.load(edit).apply_(model)
        done = apply(str(edit), str(folder / "model"), str(folder / "served" / edit.name))
        served = load_model(str(done.folder))
        said[edit.name] = [answers(one, tokenizer) for one in (model, served)]
    sys.stdout.write(json.dumps(said))


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What edited models say here, and in a process of its own."""
    folder = tmp_path_factory.mktemp("memories")
    model, tokenizer = trained_tiny_model()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    here = {}
    for name in REMEMBERING:
        editor = quick_editor(EDITORS.get(name, RememberingEditor))
        edit = editor.edit(tiny_requests(2))
        edit.save(folder / "edits" / name)
        edit.apply_(editor.model)
        assert EditMemory.find(editor.model) is not None
        here[name] = answers(editor.model, tokenizer)
    done = run_process(elsewhere, folder)
    assert done.returncode == 0, done.stderr
    return here, json.loads(done.stdout)


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_saved_edit_answers_the_same_in_another_process(
    name: str, said: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    here, there = said
    for answered in there[name]:
        assert answered["texts"] == here[name]["texts"]
        for found, wanted in zip(answered["scores"], here[name]["scores"], strict=True):
            assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", REMEMBERING)
def test_anybodys_teacher_forcing_sees_the_edits(name: str, subtests: pytest.Subtests) -> None:
    """One pass over prompts and answers gives what prompts alone and then their answers give."""
    editor = quick_editor(EDITORS.get(name, RememberingEditor))
    model, tokens = editor.model, editor.tokens
    requests = tiny_requests(3)
    with torch.no_grad():
        base = model(input_ids=torch.tensor([tokens.prompt(requests[0].prompt)])).logits
    editor.edit(requests[:2]).apply_(model)
    memory = EditMemory.find(model)
    assert memory is not None
    asked = prompt_ids(model, tokens, [r.prompt for r in requests])
    prompts = [asked[r.prompt] for r in requests]
    targets = [tokens.target(r.prompt, r.target_new) for r in requests]
    scores = score_targets(model, tokens, list(zip(prompts, targets, strict=True)))
    with torch.no_grad():
        edited = model(input_ids=torch.tensor([prompts[0]])).logits
    assert edited.shape != base.shape or not torch.equal(edited, base)  # it answers at all
    rows = [[*p, *t] for p, t in zip(prompts, targets, strict=True)]
    lengths = [len(prompt) for prompt in prompts]
    for side in ("left", "right"):
        ids, mask = pad_rows(rows, tokens.pad_id, side=side)
        said = [[IGNORE_INDEX] * len(p) + t for p, t in zip(prompts, targets, strict=True)]
        labels, _ = pad_rows(said, IGNORE_INDEX, side=side)
        places = (mask.cumsum(1) - 1).clamp_min(0)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        with torch.no_grad():
            found = {"labels": model(**given, labels=labels).logits}
            with memory.prompts_of(lengths):
                found["lengths"] = model(**given).logits
                found["no cache"] = model(**given, use_cache=False).logits
            if name not in BY_PROMPT:
                found["nothing told"] = model(**given).logits
        for told, logits in found.items():
            with subtests.test(f"{told}, {side}"):
                shifted = torch.log_softmax(logits[:, :-1].float(), -1)
                own = shifted.gather(2, ids[:, 1:, None])[..., 0]
                for row, wanted, score in zip(own, labels[:, 1:], scores, strict=True):
                    log_probs = row[wanted != IGNORE_INDEX]
                    expected = torch.tensor(score.log_probs)
                    torch.testing.assert_close(log_probs, expected, rtol=1e-3, atol=1e-3)
    with subtests.test("a harness"):
        pairs = [(r.prompt, f" {r.target_new}") for r in requests]
        for found_pair, score in zip(
            log_likelihoods(model, tokens.tokenizer, pairs), scores, strict=True
        ):
            assert found_pair[0] == pytest.approx(sum(score.log_probs), abs=1e-3)
            assert found_pair[1] == (score.argmax == score.target)


def test_prompts_that_are_told_must_be_those_of_the_rows() -> None:
    editor = quick_editor(EDITORS["GRACE"])
    editor.edit(tiny_requests(1)).apply_(editor.model)
    ids = torch.tensor([editor.tokens.prompt(tiny_requests(1)[0].prompt)])
    for lengths in ([1, 2], [0], [ids.shape[1] + 1]):
        with (
            torch.no_grad(),
            editor.memory.prompts_of(lengths),
            pytest.raises(EditError, match="`lengths` are the tokens of each row's prompt, 1 of"),
        ):
            editor.model(input_ids=ids)


@pytest.mark.parametrize("name", sorted({*REMEMBERING} - {RememberingEditor.__name__}))
def test_a_memory_without_entries_is_in_nobodys_way(name: str, subtests: pytest.Subtests) -> None:
    first = quick_editor(EDITORS[name])
    model, request, memory = first.model, tiny_requests(1), first.memory
    names = set(EDITORS) & {*REMEMBERING} - {name}
    for other in sorted(names):
        with subtests.test(other):
            cls = EDITORS[other]
            second = cls.from_model(model, first.tokens.tokenizer, **quick(cls))
            edit = second.edit(request)
            edit.apply_(model)
            if EditMemory.find(model) is not memory:  # else they share one
                with pytest.raises(EditError, match="The model has a memory already"):
                    first.edit(request)
            edit.revert_(model)
            own = first.edit(request)
            own.apply_(model)
            assert EditMemory.find(model) is memory
            own.revert_(model)
