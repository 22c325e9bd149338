# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Prompts, subjects and targets become the right tokens, whatever the tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_edit.core.batch import IGNORE_INDEX, EditBatch, PromptTokenizer, pad_rows
from lightning_edit.core.errors import ModelError, RequestError
from lightning_edit.core.request import EditRequest
from lightning_edit.demos import tiny_requests, tiny_tokenizer

CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SYSTEM_CHAT = "<|system|>\nYou help. Be brief.\n" + CHAT


def _with_ends(begin: str = "", end: str = "") -> Any:
    """The tiny tokenizer with a special token before or after each text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<start>"})
    parts = [part for part in (begin, "$A", end) if part]
    ids = tokenizer.get_vocab()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(parts),
        special_tokens=[(part, ids[part]) for part in parts if part != "$A"],
    )
    return tokenizer


def _word_tokenizer() -> Any:
    """Words after white space, as in SentencePiece: a leading ▁ that no text has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    texts = ["The capital of Velmora is Dorin.", "法国的首都是罗马", '"Velmora"', "(Velmora),"]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")  # noqa: S106


def _chat(template: str = CHAT) -> PromptTokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return PromptTokenizer(tokenizer, chat_template=True)


TOKENIZERS: dict[str, Callable[[], PromptTokenizer]] = {
    "no start": lambda: PromptTokenizer(tiny_tokenizer()),
    "start": lambda: PromptTokenizer(_with_ends("<start>")),
    "start and end": lambda: PromptTokenizer(_with_ends("<start>", "<end>")),
    "words": lambda: PromptTokenizer(_word_tokenizer()),
    "chat": _chat,
    "chat with system prompt": lambda: _chat(SYSTEM_CHAT),
}


def _spans(tokens: PromptTokenizer, ids: list[int], text: str) -> list[tuple[int, int]]:
    """Where each token stands in the rendered text, by decoding ever more tokens."""
    encoded = tokens.tokenizer(
        text, return_offsets_mapping=True, add_special_tokens=not tokens.chat_template
    )
    assert list(encoded["input_ids"])[: len(ids)] == ids
    return list(encoded["offset_mapping"])[: len(ids)]


# -- the subject's last token ----------------------------------------------------------------


SUBJECTS = [
    ("The capital of Velmora is", "Velmora"),
    ("Velmora has its capital in", "Velmora"),
    ("What is the capital of Velmora?", "Velmora"),
    ('They call it "Velmora" in', "Velmora"),
    ("They call it “Velmora”, which", "Velmora"),
    ("Velmora's capital is", "Velmora"),
    ("The capital (of Velmora) is", "Velmora"),
    ("Velmora and Velmora again", "Velmora"),
    ("The flag of Ivory Bay is", "Ivory Bay"),
    ("法国的首都是", "法国"),
    ("首都はドリンです", "ドリン"),
    ("Zoë Kravitz was born in", "Zoë Kravitz"),
    ("The 🇫🇷 flag is", "🇫🇷"),
    ("Velmora", "Velmora"),
    ("  Velmora is", "Velmora"),
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_last_token_of_the_subject(name: str, subtests: pytest.Subtests) -> None:
    tokens = TOKENIZERS[name]()
    for prefix, (text, subject) in itertools.product(
        ("", "So it is. ", "Velmora here. "), SUBJECTS
    ):
        with subtests.test(prefix + text):
            ids, index = tokens.subject_last(text, subject, prefix)
            rendered = tokens.render(prefix + text)
            body = (prefix + text) if prefix + text in rendered else (prefix + text).strip()
            start = (
                rendered.index(body) + len(body) - len(text.lstrip()) + text.lstrip().index(subject)
            )
            last = start + len(subject) - 1  # of its characters
            spans = _spans(tokens, ids, rendered)
            assert spans[index][0] <= last < spans[index][1]
            assert all(a > last or a == b for a, b in spans[index + 1 :] if (a, b) != spans[index])
            assert ids == tokens.prompt(prefix + text)


def test_the_first_occurrence_counts() -> None:
    tokens = PromptTokenizer(tiny_tokenizer())
    ids, index = tokens.subject_last("Dorin, Dorin and Dorin", "Dorin")
    assert tokens.tokenizer.decode(ids[: index + 1]) == "Dorin"
    # in the prompt, not in the prefix
    ids, index = tokens.subject_last("Dorin, Dorin", "Dorin", "Dorin first. ")
    assert tokens.tokenizer.decode(ids[: index + 1]) == "Dorin first. Dorin"


def test_merges_over_the_subjects_end() -> None:
    """A token that holds the subject's last letter and what follows it still ends the subject."""
    tokens = PromptTokenizer(_word_tokenizer())
    merged = [
        t for t in tokens.tokenizer.get_vocab() if "Velmora" in t and t.strip("▁") != "Velmora"
    ]
    assert merged  # such as (Velmora),
    ids, index = tokens.subject_last("(Velmora),", "Velmora")
    assert "a" in tokens.tokenizer.convert_ids_to_tokens(ids)[index]


def test_special_tokens_before_the_subject() -> None:
    plain = PromptTokenizer(tiny_tokenizer()).subject_last("Velmora is", "Velmora")
    with_start = PromptTokenizer(_with_ends("<start>")).subject_last("Velmora is", "Velmora")
    assert with_start[1] == plain[1] + 1
    assert with_start[0][1:] == plain[0]


def test_the_subject_is_not_there() -> None:
    tokens = PromptTokenizer(tiny_tokenizer())
    with pytest.raises(RequestError, match="'Ostrane' does not occur in 'Velmora is'"):
        tokens.subject_last("Velmora is", "Ostrane", "Ostrane ")


def test_a_chat_template_that_changes_the_prompt() -> None:
    tokens = _chat("{{ messages[0]['content'] | upper }}")
    with pytest.raises(RequestError, match="chat template changes the prompt 'Velmora is'"):
        tokens.subject_last("Velmora is", "Velmora")


# -- prompts and targets ---------------------------------------------------------------------


def test_prompt_and_target_are_the_text() -> None:
    tokens = PromptTokenizer(tiny_tokenizer())
    for request in tiny_requests(24):
        ids = tokens.prompt(request.prompt) + tokens.target(request.prompt, request.target_new)
        space = "" if request.prompt.endswith(" ") else " "
        assert tokens.tokenizer.decode(ids) == f"{request.prompt}{space}{request.target_new}"
        assert ids == tokens.tokenizer(f"{request.prompt} {request.target_new}").input_ids


def test_leading_space() -> None:
    tokens = PromptTokenizer(tiny_tokenizer())
    for prompt, target, space in [
        ("The capital is", "Rome", " "),
        ("The capital is", " Rome", ""),
        ("The capital is ", "Rome", ""),
        ("Capital:\n", "Rome", ""),
        ("What is it?", "Rome", " "),
        ("首都是", "罗马", ""),
        ("首都は", "ローマ", ""),
        ("首都は", "ろーま", ""),
        ("เมืองหลวงคือ", "โรม", ""),
        ("首都是", "Rome", " "),
        ("The capital is", "Рим", " "),
        ("The capital is", "로마", " "),
    ]:
        assert tokens.leading_space(prompt, target) == space, (prompt, target)
        assert tokens.tokenizer.decode(tokens.target(prompt, target)) == space + target


def test_no_special_tokens_in_targets() -> None:
    for name in ("start", "start and end"):
        tokens = TOKENIZERS[name]()
        assert (
            tokens.target("x", "Dorin")
            == tokens.tokenizer(" Dorin", add_special_tokens=False).input_ids
        )


def test_prompts_begin_with_the_start_token_and_do_not_end() -> None:
    """An end token between prompt and target would ask for an answer after the end."""
    plain = PromptTokenizer(tiny_tokenizer()).prompt("Velmora is")
    for name in ("start", "start and end"):
        tokens = TOKENIZERS[name]()
        assert tokens.prompt("Velmora is") == [tokens.tokenizer.bos_token_id, *plain]
    encoder = PromptTokenizer(_with_ends("", "<end>"), is_encoder_decoder=True)
    assert encoder.prompt("Velmora is") == [*plain, encoder.eos_id]


def test_targets_of_an_encoder_decoder() -> None:
    tokens = PromptTokenizer(tiny_tokenizer(), is_encoder_decoder=True)
    assert tokens.target("x", "Dorin") == [*tokens.tokenizer("Dorin").input_ids, tokens.eos_id]


def test_targets_after_a_chat_template() -> None:
    tokens = _chat()
    assert tokens.render("Velmora?") == "<|user|>\nVelmora?\n<|assistant|>\n"
    assert tokens.tokenizer.decode(tokens.target("Velmora?", "Dorin")) == "Dorin"


def test_empty_target() -> None:
    with pytest.raises(RequestError, match="The target '' of 'x ' has no tokens"):
        PromptTokenizer(tiny_tokenizer()).target("x ", "")


def test_unsuitable_tokenizers() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="gives no character offsets"):
        PromptTokenizer(Slow())
    with pytest.raises(ModelError, match="the tokenizer has no chat template"):
        PromptTokenizer(tiny_tokenizer(), chat_template=True)


def test_padding_token() -> None:
    tokenizer = tiny_tokenizer()
    assert PromptTokenizer(tokenizer).pad_id == tokenizer.pad_token_id == 0
    tokenizer.pad_token = None
    assert PromptTokenizer(tokenizer).pad_id == tokenizer.eos_token_id == 1
    tokenizer.eos_token = None
    assert PromptTokenizer(tokenizer).pad_id == 0
    assert PromptTokenizer(tokenizer).eos_id is None


# -- batches ---------------------------------------------------------------------------------


def _batch(is_encoder_decoder: bool = False) -> EditBatch:
    requests = [*tiny_requests(3), EditRequest("{} is", "It", "so", id="short")]
    tokens = PromptTokenizer(tiny_tokenizer(), is_encoder_decoder=is_encoder_decoder)
    return EditBatch.from_requests(requests, tokens)


def test_a_batch_for_a_decoder() -> None:
    batch = _batch()
    assert len(batch) == 4
    for b, request in enumerate(batch.requests):
        prompt = batch.tokens.prompt(request.prompt)
        target = batch.tokens.target(request.prompt, request.target_new)
        ids = batch.input_ids[b].tolist()
        filled = len(prompt) + len(target)
        assert ids[:filled] == prompt + target
        assert set(ids[filled:]) <= {batch.tokens.pad_id}
        assert batch.attention_mask[b].tolist() == [1] * filled + [0] * (len(ids) - filled)
        labels = batch.labels[b].tolist()
        assert labels[len(prompt) : filled] == target
        others = labels[: len(prompt)] + labels[filled:]
        assert set(others) == {IGNORE_INDEX}
        assert int(batch.prompt_lengths[b]) == len(prompt)
    assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape
    assert batch.input_ids.dtype == batch.labels.dtype == torch.long


def test_a_batch_for_an_encoder_decoder() -> None:
    batch = _batch(is_encoder_decoder=True)
    for b, request in enumerate(batch.requests):
        prompt = batch.tokens.prompt(request.prompt)
        length = int(batch.attention_mask[b].sum())
        assert batch.input_ids[b, :length].tolist() == prompt
        assert int(batch.prompt_lengths[b]) == length
        labels = batch.labels[b]
        target = labels[labels != IGNORE_INDEX].tolist()
        assert target == batch.tokens.target(request.prompt, request.target_new)
        assert target[-1] == batch.tokens.eos_id
        assert labels[: len(target)].tolist() == target
    assert batch.labels.shape[1] != batch.input_ids.shape[1]


def test_select() -> None:
    batch = _batch()
    part = batch.select([3, 0, 3])
    assert [request.id for request in part.requests] == ["short", "capital-velmora", "short"]
    for name in ("input_ids", "attention_mask", "labels", "prompt_lengths"):
        rows = getattr(batch, name)
        assert torch.equal(getattr(part, name), torch.stack([rows[3], rows[0], rows[3]]))
    bare = EditBatch.from_ids([[1, 2], [3]], [[4], [5, 6]], batch.tokens)
    assert bare.select([1]).requests == ()
    assert bare.select([1]).input_ids.tolist() == [[3, 5, 6]]
    assert len(batch.select([])) == 0


def test_to() -> None:
    batch = _batch().to("meta")
    for name in ("input_ids", "attention_mask", "labels", "prompt_lengths"):
        assert getattr(batch, name).device.type == "meta"
    assert batch.requests == _batch().requests


def test_an_empty_batch() -> None:
    with pytest.raises(RequestError, match="A batch of edits is empty"):
        EditBatch.from_requests([], PromptTokenizer(tiny_tokenizer()))


def test_pad_rows() -> None:
    ids, mask = pad_rows([[1, 2, 3], [], [4]], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    ids, mask = pad_rows([[1, 2, 3], [], [4]], 9, side="left")
    assert ids.tolist() == [[1, 2, 3], [9, 9, 9], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]
    assert pad_rows([], 0)[0].shape == (0, 0)
    assert ids.dtype == mask.dtype == torch.long
