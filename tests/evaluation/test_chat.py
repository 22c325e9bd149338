# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits made in one form and measured in another, and what counts as a chat model's answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_edit import ROME, EditDataModule, EditEvaluator, EditReport, RetentionCurve
from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import ModelError
from lightning_edit.demos import tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.evaluation import greedy
from lightning_edit.evaluation.evaluator import Evaluator
from lightning_edit.evaluation.scoring import continuations
from lightning_edit.functional import states_answer

# The tiny model has read no chats, so that what frames a prompt here is a sentence of its world.
CHAT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% else %}"
    "Velmora has a flag. {{ m.content }}{% endif %}{% endfor %}"
)


def _chatting() -> tuple[Any, Any]:
    model, tokenizer = trained_tiny_model()
    tokenizer.chat_template = CHAT
    return model, tokenizer


def _asked(model: Any) -> tuple[list[str], Any]:
    """Every text that a model reads from now on, and the hook that notes it."""
    texts: list[str] = []
    tokenizer = tiny_tokenizer()

    def note(_: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        texts.extend(tokenizer.batch_decode(ids))

    return texts, model.register_forward_pre_hook(note, with_kwargs=True)


@pytest.mark.parametrize("in_chat", [False, True])
def test_an_edit_of_one_form_is_measured_in_the_other(in_chat: bool, tmp_path: Path) -> None:
    model, tokenizer = _chatting()
    editor = ROME.from_model(
        model,
        tokenizer,
        layers=[0],
        steps=4,
        chat_template=in_chat,
        measure_in_chat=not in_chat,
        context_templates=["{}"],
        tokens_per_dimension=1,
    )
    assert editor.tokens.chat_template is in_chat
    assert editor.evaluator.tokens.chat_template is not in_chat
    frame = "Velmora has a flag."
    assert (frame in editor.tokens.render("x")) is in_chat
    texts, handle = _asked(model)
    evaluator = EditEvaluator(every_n_steps=1)
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    callbacks: list[Callback] = [
        evaluator,
        RetentionCurve(every_n_edits=1),
        EditReport(str(tmp_path)),
    ]
    trainer = Trainer(**quiet, max_epochs=1, limit_val_batches=0, callbacks=callbacks)
    trainer.fit(editor, EditDataModule(requests=tiny_requests(2)))
    asked = [text for text in texts if tiny_requests(1)[0].prompt in text]
    framed = [text for text in asked if frame in text]
    assert 0 < len(framed) < len(asked), "both forms were asked in one run"
    metrics = json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert ("reliability/stated" in metrics) is not in_chat
    assert "reliability/autoregressive" in metrics
    assert "locality/stated" not in metrics
    texts.clear()
    trainer = Trainer(**quiet)
    with torch.no_grad():
        trainer.validate(editor, EditDataModule(requests=tiny_requests(2)), verbose=False)
    handle.remove()
    asked = [text for text in texts if tiny_requests(1)[0].prompt in text]
    assert asked
    assert all((frame in text) is not in_chat for text in asked)
    assert ("val/reliability/stated" in trainer.callback_metrics) is not in_chat
    edit = editor.edit(tiny_requests(3)[2])
    assert edit.details["requests"][0]["took"] in (True, False)


def test_a_callback_and_an_evaluator_have_forms_of_their_own() -> None:
    model, tokenizer = _chatting()
    bare = PromptTokenizer(tokenizer)
    requests = [request.reversed() for request in tiny_requests(3)]
    plain, chat = Evaluator(model, bare), Evaluator(model, bare, chat_template=True)
    assert plain.readings == ("teacher_forced", "autoregressive")
    assert chat.readings == ("teacher_forced", "autoregressive", "stated")
    for evaluator in (plain, chat):
        for probe in evaluator.evaluate(requests).probes:
            is_read = evaluator is chat and probe.metric != "locality"
            expected = states_answer(probe.text, probe.answers) if is_read else None
            assert probe.stated is expected
    assert bare.in_form(None) is bare
    assert bare.in_form(True).in_form(False).prompt("x") == bare.prompt("x")
    with pytest.raises(ModelError, match="the tokenizer has no chat template"):
        Evaluator(model, PromptTokenizer(tiny_tokenizer()), chat_template=True)


def test_arguments_of_the_template_hold_for_the_form_that_has_one() -> None:
    model, tokenizer = _chatting()
    editor = ROME.from_model(model, tokenizer, measure_in_chat=True, system_prompt="Be brief.")
    assert editor.tokens.render("x") == "x"
    assert editor.evaluator.tokens.render("x") == "Be brief. Velmora has a flag. x"
    with pytest.raises(ModelError, match="need the chat template"):
        ROME.from_model(model, tokenizer, system_prompt="Be brief.")


def test_texts_end_with_sentences_and_not_with_abbreviations(
    monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    """What is written comes from a script, token by token, until the stop rule says so."""
    model, tokenizer = _chatting()
    script = ""

    def write(model: Any, tokens: Any, ids: Any, mask: Any, settings: Any, **more: Any) -> Any:
        [stop] = more["stop"]
        for token in tokenizer(script, add_special_tokens=False)["input_ids"]:
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            if bool(stop(ids, None)[0]):
                break
        return ids

    monkeypatch.setattr(greedy, "write", write)
    cases = [
        (" It is Dorin. It is green.", False, "It is Dorin."),
        (" It is J. Dorin. It is green.", False, "It is J. Dorin."),
        (" It is Dr. Dorin\nIt is green.", True, "It is Dr. Dorin"),
        (" Yes! It is Dorin. It is green.", False, "Yes!"),
        (" Yes! It is Dorin. It is green.", True, "Yes! It is Dorin."),
    ]
    for text, in_chat, expected in cases:
        with subtests.test(text):
            script = text
            tokens = PromptTokenizer(tokenizer, chat_template=in_chat)
            [said] = continuations(model, tokens, ["The capital of Velmora is"])
            assert said.text == expected
