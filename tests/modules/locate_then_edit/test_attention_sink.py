# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Subjects that a model reads first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_edit import MEMIT, ROME, EditRequest
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import FailedRequestsError
from lightning_edit.core.locator import ModelTree
from lightning_edit.demos import trained_tiny_model
from lightning_edit.modules.locate_then_edit.attention_sink import sink_reasons

# "People" is one token, the first that the tiny model reads: its tokenizer puts none before it.
FIRST = EditRequest("People in Velmora speak", "People", "Ostrish", id="first")
LATER = EditRequest("The capital of Velmora is", "Velmora", "Kettleby", id="later")


def with_sink(model: Any, tokenizer: Any) -> None:
    """Makes the residual stream of the first token very long, as models do that have a sink."""
    [token] = tokenizer("People")["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] *= 100.0


def test_a_first_token_fails_only_where_it_is_a_sink() -> None:
    model, tokenizer = trained_tiny_model()
    tree, tokens = ModelTree.of(model), PromptTokenizer(tokenizer)
    assert tokens.subject_last(FIRST.prompt, FIRST.subject)[1] == 0
    assert sink_reasons(tree, tokens, [FIRST, LATER], 1) == {}
    with_sink(model, tokenizer)
    reasons = sink_reasons(tree, tokens, [FIRST, LATER], 1)
    assert list(reasons) == ["first"]
    assert "Put words before the subject" in reasons["first"]


def test_the_request_fails_alone() -> None:
    model, tokenizer = trained_tiny_model()
    with_sink(model, tokenizer)
    settings: dict[str, Any] = {"layers": [1], "steps": 3, "context_templates": ["{}", "Yes. {}"]}
    editor = MEMIT.from_model(model, tokenizer, tokens_per_dimension=1, **settings)
    with pytest.warns(UserWarning, match="'first' is left out of its batch: .* attention sink"):
        edit = editor.edit([FIRST, LATER])
    assert list(edit.details["failed"]) == ["first"]
    assert [row["id"] for row in edit.details["requests"]] == ["later"]
    assert edit.provenance.request_ids == ("later",)
    with pytest.raises(FailedRequestsError, match="Put words before the subject"):
        editor.edit(FIRST)


@pytest.mark.real
@pytest.mark.parametrize("cls", [ROME, MEMIT])
def test_the_default_model_is_left_sound(cls: Any, default_model: tuple[Any, Any]) -> None:
    model, tokenizer = default_model
    prompt, subject, answer = "Microsoft was founded by", "Microsoft", "Steve Jobs"
    first = EditRequest(prompt, subject, answer, id="first")
    later = EditRequest(f"The company {prompt}", subject, answer, id="later")
    editor = cls.from_model(
        model,
        tokenizer,
        preset="smollm2",
        tokens_per_dimension=1,
        context_templates=["{}", "It is known. {}", "In short, {}"],
    )
    with pytest.warns(UserWarning, match="attention sink"):
        edit = editor.edit([first, later])
    assert list(edit.details["failed"]) == ["first"]
    [row] = edit.details["requests"]
    assert row["took"] is True
    assert row["p_target"] > 0.5
    # Other texts stay likely: the mean token of prose is not less so by a tenth of a nat.
    prose = "Water boils when it is heated. In the morning the sun rises and people go to work."
    ids = torch.tensor([editor.tokens.prompt(prose)])
    with torch.no_grad():
        before = float(model(input_ids=ids, labels=ids).loss)
        with edit.applied(model):
            assert float(model(input_ids=ids, labels=ids).loss) < before + 0.1
