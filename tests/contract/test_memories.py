# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Every editor that remembers answers the same elsewhere, from files alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_edit import Edit, EditMemory
from lightning_edit.artifacts import apply
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.evaluation.scoring import continuations, score_targets
from lightning_edit.models import load_model, load_tokenizer
from lightning_edit.modules.memory_based.base import MemoryModule
from tests.contract.enumeration import EDITORS, RememberingEditor, quick_editor
from tests.processes import run_process

REMEMBERING = [name for name, cls in EDITORS.items() if issubclass(cls, MemoryModule)]
REMEMBERING.append(RememberingEditor.__name__)


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
