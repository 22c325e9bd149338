# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Targets have the tokens of the running text, whatever the tokenizer's pipeline."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import ModelError
from tests.core.families import FACTS, FAMILIES, family

# A token of the whole text reaches over the seam: white space at the end, or inside a word.
STRADDLING = [
    ("The capital of Velmora is ", "Dorin", None),
    ("This island is", "land", True),
    ("Nothing but Do", "rin", True),
]
CHATS = {
    "a space before answers": (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "[INST] {{ m['content'] | trim }} [/INST]"
        "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}",
        " ",
    ),
    "a line before answers": (
        "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% if enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}{% endif %}",
        "",
    ),
    "no answers": ("{{ messages[0]['content'] }}{{ messages[1] | length if messages[1:] }}", ""),
}


def _whole(tokenizer: Any, text: str) -> list[int]:
    ids = [int(i) for i in tokenizer(text)["input_ids"]]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_are_the_tail_of_the_whole_text(name: str, subtests: pytest.Subtests) -> None:
    tokenizer = family(name)
    tokens = PromptTokenizer(tokenizer)
    for fact in FACTS:
        with subtests.test(fact.text):
            prompt = tokens.prompt(fact.prompt)
            target = tokens.target(fact.prompt, fact.answer, fact.glued)
            whole = _whole(tokenizer, fact.text)
            assert tokenizer.decode(prompt + target, skip_special_tokens=True) == fact.text
            if whole[: len(prompt)] == prompt:
                assert prompt + target == whole
            else:  # Unigram may cut the last word of the prompt in another way
                assert (name, fact.glued) == ("T5", True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_over_the_seam(name: str, subtests: pytest.Subtests) -> None:
    """The prompt keeps its tokens, and the target is a piece of running text."""
    tokenizer = family(name)
    tokens = PromptTokenizer(tokenizer)
    for prompt, answer, glued in STRADDLING:
        with subtests.test(prompt + answer):
            before, target = tokens.prompt(prompt), tokens.target(prompt, answer, glued)
            assert tokenizer.decode(before + target, skip_special_tokens=True) == prompt + answer
            assert not tokenizer.convert_ids_to_tokens(target)[0].startswith(("▁", "Ġ"))


def test_the_answer_of_a_decoder_begins_a_text() -> None:
    tokenizer = family("T5")
    tokens = PromptTokenizer(tokenizer, is_encoder_decoder=True)
    for glued in (None, True, False):
        assert tokens.target("It is", "Dorin", glued) == tokenizer("Dorin")["input_ids"]


# -- chat templates --------------------------------------------------------------------------


def _chat(template: str, **arguments: Any) -> PromptTokenizer:
    tokenizer = copy.deepcopy(family("Llama 2"))
    tokenizer.chat_template = template
    return PromptTokenizer(tokenizer, chat_template=True, **arguments)


@pytest.mark.parametrize("name", CHATS)
def test_answers_in_a_chat_follow_as_its_template_has_it(name: str) -> None:
    template, space = CHATS[name]
    tokens = _chat(template)
    for prompt, answer in (("Which is it?", "Dorin"), ("首都は", "東京")):
        assert tokens.leading_space(prompt, answer, glued=True) == space
        ids = tokens.prompt(prompt) + tokens.target(prompt, answer)
        told = tokens.render(prompt) + space + answer
        assert ids == tokens.tokenizer(told, add_special_tokens=False)["input_ids"]


def test_arguments_of_a_chat_template() -> None:
    template = CHATS["a line before answers"][0]
    open_end = "<user>\nIs it Dorin?<end>\n<assistant>\n"
    assert _chat(template).render("Is it Dorin?") == open_end
    tokens = _chat(
        template, chat_template_kwargs={"enable_thinking": False}, system_prompt="Of Dorin."
    )
    rendered = f"<system>\nOf Dorin.<end>\n{open_end}<think>\n\n</think>\n\n"
    assert tokens.render("Is it Dorin?") == rendered
    # The subject is that of the prompt, though the system's message names it, too.
    ids, last = tokens.subject_last("Is it Dorin?", "Dorin")
    text = tokens.tokenizer.decode(ids[: last + 1])
    assert text.endswith("<user>\nIs it Dorin")


def test_arguments_that_a_chat_template_does_not_take(subtests: pytest.Subtests) -> None:
    refusing = "{% if messages[1:] %}{{ raise_exception('No system') }}{% endif %}"
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("thinks", {"chat_template_kwargs": {"enable_thinkin": 1}}, "names 'enable_thinkin'"),
        ("thinks", {"chat_template_kwargs": {"tokenize": True}}, "names 'tokenize'"),
        ("passes over", {"system_prompt": "Be brief."}, "passes over `system_prompt`"),
        ("refuses", {"system_prompt": "Be brief."}, "refuses .*No system.*Leave them out"),
    ]
    templates = {
        "thinks": CHATS["a line before answers"][0],
        "passes over": "{{ messages[-1]['content'] }}",
        "refuses": refusing + "{{ messages[-1]['content'] }}",
    }
    for name, arguments, message in cases:
        with subtests.test(message), pytest.raises(ModelError, match=message):
            _chat(templates[name], **arguments)
    with pytest.raises(ModelError, match=r"need the chat template\. Set"):
        PromptTokenizer(family("Qwen"), system_prompt="Be brief.")
