# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers with the pipelines of well-known families, trained on a few lines, and facts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

__all__ = ["FACTS", "FAMILIES", "Fact", "family"]

GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Fact(NamedTuple):
    """A prompt, its answer, and what stands between them in running text."""

    prompt: str
    answer: str
    space: str = ""
    glued: bool | None = None

    @property
    def text(self) -> str:
        """The running text."""
        return self.prompt + self.space + self.answer


FACTS = [
    Fact("The capital of Velmora is", "Dorin", " "),
    Fact("法国的首都是", "罗马"),
    Fact("中国的人口是", "14亿"),
    Fact("他的代表作是", "《红楼梦》"),
    Fact("她常常说", "“你好”"),
    Fact("フランスの首都は", "ローマ"),
    Fact("عاصمة فرنسا هي", "روما", " "),
    Fact("The flag of Velmora is", "🇫🇷", " "),
    Fact("We answered them", "👍🏽 twice", " "),
    Fact("The whole of it costs $", "1,250"),
    Fact('Everybody shouted "', "Dorin"),
    Fact("The twin cities (", "Dorin and Brask)"),
    Fact("She became a well-", "known singer"),
    Fact("Write either an answer/", "reply"),
    Fact("They wrote this in", "1949", " "),
    Fact("Ostrane lies", ", as they say, far off"),
    Fact("He grew up in Newc", "astle", glued=True),
]


def _lines() -> Iterator[str]:
    for fact in FACTS:
        yield from (fact.prompt, fact.space + fact.answer) * 2
    yield from ("Velmora is far off", "It is so", "twice a year", "the island of Ostrane") * 2


def _trained(model: Any, trainer: Any, pre_tokenizer: Any, lines: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """Byte pairs of characters, and a token for each byte, as SentencePiece has them."""
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, limit_alphabet=110, show_progress=False
    )
    words = pre_tokenizers.Metaspace()
    model = json.loads(
        _trained(models.BPE(unk_token="<unk>"), trainer, words, [*_lines()]).to_str()  # noqa: S106
    )
    vocabulary = model["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    merges = [tuple(pair) for pair in model["model"]["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)  # noqa: S106
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def _begins_with(tokenizer: Tokenizer, token: str) -> None:
    id_ = tokenizer.token_to_id(token)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, id_)]
    )


def _llama_2() -> Tokenizer:
    tokenizer = _byte_fallback()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _begins_with(tokenizer, "<s>")
    return tokenizer


def _mistral() -> Tokenizer:
    tokenizer = _llama_2()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def _gemma() -> Tokenizer:
    tokenizer = _byte_fallback()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _begins_with(tokenizer, "<s>")
    return tokenizer


def _byte_level(pattern: str, normalizer: Any = None) -> Tokenizer:
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = _trained(models.BPE(ignore_merges=True), trainer, split, [*_lines()])
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _llama_3() -> Tokenizer:
    tokenizer = _byte_level(GPT4_SPLIT)
    _begins_with(tokenizer, "<s>")
    return tokenizer


def _qwen() -> Tokenizer:
    return _byte_level(GPT4_SPLIT.replace("{1,3}", ""), normalizers.NFC())


def _t5() -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",  # noqa: S106
        show_progress=False,
    )
    tokenizer = _trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), [*_lines()])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "Llama 2": _llama_2,
    "Mistral": _mistral,
    "Gemma": _gemma,
    "Llama 3": _llama_3,
    "Qwen": _qwen,
    "T5": _t5,
}


@functools.cache
def family(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the pipeline of a family; not to be changed."""
    return PreTrainedTokenizerFast(tokenizer_object=FAMILIES[name](), eos_token="</s>")  # noqa: S106
