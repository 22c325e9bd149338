# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Perplexity against one window at a time, read without padding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import EditError
from lightning_edit.demos import tiny_tokenizer
from lightning_edit.evaluation.prose import perplexity, read_prose
from tests import zoo
from tests.modules.helpers import plain_nll

TEXT = "The capital of Velmora is Dorin. " * 9 + "A word more"


def ids_of(text: str) -> list[int]:
    return [int(i) for i in tiny_tokenizer()(text)["input_ids"]]


def mean_of(parts: list[list[torch.Tensor]]) -> float:
    values = [float(value) for part in parts for value in part]
    return math.exp(sum(values) / len(values))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("window", [10, 64])
def test_every_window_is_read_by_itself(kind: str, window: int) -> None:
    model = zoo.build(kind)
    ids = ids_of(TEXT)
    assert len(ids) % window > 1
    rows = [ids[start : start + window] for start in range(0, len(ids), window)]
    with torch.no_grad():
        wanted = mean_of([plain_nll(model, row[:1], row[1:]) for row in rows])
    found = perplexity(model, PromptTokenizer(tiny_tokenizer()), TEXT, window=window)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_an_encoder_decoder_is_asked_for_second_halves() -> None:
    model = zoo.build("t5")
    ids = ids_of(TEXT)
    rows = [ids[start : start + 11] for start in range(0, len(ids), 11)]
    assert len(rows[-1]) > 1
    halves = [(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows]
    with torch.no_grad():
        wanted = mean_of([plain_nll(model, first, second) for first, second in halves])
    tokens = PromptTokenizer(tiny_tokenizer(), is_encoder_decoder=True)
    assert perplexity(model, tokens, TEXT, window=11) == pytest.approx(wanted, rel=1e-4)


def test_windows_begin_as_the_model_expects_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<end>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", begin)]
    )
    model = zoo.build("llama")
    ids = ids_of(TEXT)
    rows = [ids[start : start + 19] for start in range(0, len(ids), 19)]
    assert len(rows[-1]) > 1
    with torch.no_grad():
        wanted = mean_of([plain_nll(model, [begin], row) for row in rows])
    found = perplexity(model, PromptTokenizer(tokenizer), TEXT, window=20)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_windows_fit_into_the_model() -> None:
    model = zoo.build("gpt2")  # which has 128 positions
    tokens = PromptTokenizer(tiny_tokenizer())
    long = read_prose()
    assert perplexity(model, tokens, long) == perplexity(model, tokens, long, window=128)


def test_a_broken_model_has_no_finite_perplexity() -> None:
    model = zoo.build("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(math.nan)
    assert perplexity(model, PromptTokenizer(tiny_tokenizer()), TEXT) == math.inf


def test_texts_are_read_from_files(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Größe", encoding="utf-8")
    assert read_prose(tmp_path / "own.txt") == "Größe"
    assert len(read_prose().split()) > 500
    with pytest.raises(EditError, match=r"no text file `.*missing.txt`"):
        read_prose(tmp_path / "missing.txt")
    with pytest.raises(EditError, match="two tokens or more, but got 0"):
        perplexity(zoo.build("llama"), PromptTokenizer(tiny_tokenizer()), "")
