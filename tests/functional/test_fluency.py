# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""functional/fluency.py against entropies worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_edit.functional import ngram_entropy


def slow_entropy(tokens: list[str], n: int) -> float:
    grams = [" ".join(tokens[i : i + n]) for i in range(len(tokens)) if i + n <= len(tokens)]
    shares = [grams.count(gram) / len(grams) for gram in sorted(set(grams))]
    return -sum(share * math.log(share) / math.log(2) for share in shares)


def test_by_hand() -> None:
    # Bigrams ab, ba, ab, ba: one bit. Trigrams aba, bab, aba: log2(3) - 2/3 bits.
    expected = (2 / 3 * 1 + 4 / 3 * (math.log2(3) - 2 / 3)) / 2
    assert ngram_entropy(list("ababa")) == pytest.approx(expected)


def test_distinct_words_reach_the_bound() -> None:
    # A hundred different words: log2(99) and log2(98) bits, about the 6.2 of human text in tables.
    expected = (2 / 3 * math.log2(99) + 4 / 3 * math.log2(98)) / 2
    assert ngram_entropy(range(100)) == pytest.approx(expected)


def test_equals_a_slow_count_and_takes_other_lengths() -> None:
    ids = torch.randint(4, (60,), generator=torch.Generator().manual_seed(0))
    words = ["abcd"[i] for i in ids]
    h = {n: slow_entropy(words, n) for n in (1, 2, 3, 4)}
    assert ngram_entropy(words) == pytest.approx((2 / 3 * h[2] + 4 / 3 * h[3]) / 2)
    assert ngram_entropy(words, n=(1, 4), weights=(0.5, 1.5)) == pytest.approx(
        (0.5 * h[1] + 1.5 * h[4]) / 2
    )


def test_repetition_and_short_texts() -> None:
    assert ngram_entropy(["a"] * 50) == 0
    # Two bigrams, one bit; one trigram, none.
    assert ngram_entropy(["a", "b", "c"]) == pytest.approx(1 / 3)
    assert math.isnan(ngram_entropy(["a", "b"]))


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="Split it"):
        ngram_entropy("a b c d")
    for n, weights in (((2,), (1.0, 2.0)), ((), ()), ((0,), (1.0,))):
        with pytest.raises(ValueError, match="pair up"):
            ngram_entropy(list("abcd"), n=n, weights=weights)
