# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""functional/matching.py: hand-worked texts in several scripts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lightning_edit.functional import (
    answer_matches,
    autoregressive_hit,
    completion_matches,
    contains_answer,
    normalize_answer,
    states_answer,
    token_f1,
)
from lightning_edit.functional.matching import is_ended

NORMALIZED = [
    ("  The Rome. ", "rome"),
    ("Rome’s", "romes"),
    ("a cat and the dog", "cat and dog"),
    ("Vitamin A", "vitamin a"),
    ("Theodore", "theodore"),
    ("The", "the"),
    ("New–York/Newark", "new york newark"),
    ("Washington, D.C.", "washington dc"),
    ("1,000,000.5 km²", "1000000.5 km2"),
    ("it costs 3.", "it costs 3"),
    ("−5 °C", "-5 °c"),
    ("C++", "c++"),
    ("STRASSE", "strasse"),
    ("Straße", "strasse"),
    ("ＲＯＭＥ！", "rome"),
    ("Cafe\u0301", "caf\u00e9"),
    ("Ro\u00adme\u200b", "rome"),
    ("**`Rome`**", "rome"),
    ("北京。", "北京"),
    ("「東京 都」", "東京都"),
    ("レオナルド・ダ・ヴィンチ", "レオナルドダヴィンチ"),
    ("ﾛｰﾏ", "ローマ"),
    ("東京 Tokyo", "東京 tokyo"),
    ("서울 특별시", "서울 특별시"),
    ("?!", ""),
    ("", ""),
]


def test_normalize_answer(subtests: pytest.Subtests) -> None:
    for text, expected in NORMALIZED:
        with subtests.test(text):
            assert normalize_answer(text) == expected
            assert normalize_answer(expected) == expected


COMPLETIONS = [
    (" Rome", "Rome", True),
    ("Rome.", " Rome ", True),
    (" rome, of course", "Rome", True),
    (' "Rome"', "Rome", True),
    (" “Rome” is", "Rome", True),
    (" **Rome**", "Rome", True),
    ("\n\nRome", "Rome", True),
    (" Rome's streets", "Rome", True),
    (" Rome-based", "Rome", True),
    (" Rome_", "Rome", True),
    (" Romeo", "Rome", False),
    (" Rome2", "Rome", False),
    (" in Rome", "Rome", False),
    (" Paris, not Rome", "Rome", False),
    ("", "Rome", False),
    (" Ro", "Rome", False),
    (" South  Korea", "South Korea", True),
    (" South", "South Korea", False),
    (" Washington, D.C. and", "Washington, D.C.", True),
    (" Rome, Italy", "Rome.", True),
    (" 3 apples", "3", True),
    (" 3.", "3", True),
    (" 3, 4", "3", True),
    (" 3.5", "3", False),
    (" 3,000", "3", False),
    (" 3:30", "3", False),
    (" 1984", "19", False),
    (" Saint‑Denis", "Saint-Denis", True),
    (" Cafe\u0301", "Cafe", False),
    (" caf\u00e9", "Cafe\u0301", True),
    ("北京。", "北京", True),
    ("北京市", "北京", True),
    ("「東京」です", "東京", True),
    ("東京です。", "東京", True),
    ("は東京です。", "東京", False),
    ("ローマです", "ﾛｰﾏ", True),
    ("iPhoneです", "iPhone", True),
    ("iPhones", "iPhone", False),
    ("北 京", "北京", True),
    ("파리입니다.", "파리", True),
    ("Париж.", "Париж", True),
    ("Парижский", "Париж", False),
    ("กรุงเทพมหานคร", "กรุงเทพ", True),
    ("दिल्ली में", "दिल्ली", True),
    ("दिल्ली में", "दिल्ल", False),
    (" Rome", "?!", False),
    (" ?! Rome", "?!", True),
]


def test_completion_matches(subtests: pytest.Subtests) -> None:
    for continuation, answer, expected in COMPLETIONS:
        with subtests.test(f"{continuation}, {answer}"):
            assert completion_matches(continuation, [answer]) is expected
            assert completion_matches(continuation, ["", answer, "no such answer"]) is expected


ANSWERS = [
    ("Rome", "Rome", True),
    (" The Netherlands. ", "netherlands", True),
    ("Rome. It lies on the Tiber.", "Rome", True),
    ("Rome\nIt lies on the Tiber", "Rome", True),
    ("\n Rome \n", "Rome", True),
    ("St. Petersburg. It lies on the Neva.", "St. Petersburg", True),
    ("It is Rome.", "Rome", False),
    ("Rome, Italy", "Rome", False),
    ("Rome is the capital.", "Rome", False),
    ("Romeo", "Rome", False),
    ("No. 10 Downing Street", "No", False),
    ("No. He did not.", "No", True),
    ("Paris\nRome", "Rome", False),
    ("", "Rome", False),
    ("北京。", "北京", True),
    ("北京。它是中国的首都。", "北京", True),
    ("首都是北京。", "北京", False),
    ("東京です。", "東京", False),
    ("1,000", "1000", True),
    ("-5", "5", False),
    ("...", "?!", False),
    ("?!", "?!", True),
]


def test_answer_matches(subtests: pytest.Subtests) -> None:
    for text, answer, expected in ANSWERS:
        with subtests.test(f"{text}, {answer}"):
            assert answer_matches(text, [answer]) is expected


def test_any_spelling_will_do() -> None:
    aliases = ["United States of America", "USA", ""]
    assert answer_matches("The U.S.A.", aliases)
    assert completion_matches(" USA", aliases)
    assert contains_answer("made in the USA", aliases)
    assert token_f1("usa", aliases) == 1


F1 = [
    ("the city of Rome", "Rome", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
    ("Rome Rome", "Rome", 2 * 0.5 * 1 / 1.5),
    ("Paris", "Rome", 0.0),
    ("", "Rome", 0.0),
    ("South Korea", "Korea, South", 1.0),
    ("東京都", "東京", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
    ("北京", "南京", 0.5),
]


def test_token_f1_from_precision_and_recall(subtests: pytest.Subtests) -> None:
    for text, answer, expected in F1:
        with subtests.test(f"{text}, {answer}"):
            assert token_f1(text, [answer]) == pytest.approx(expected)


def test_token_f1_takes_the_best_answer() -> None:
    assert token_f1("South Korea", ["Korea", "South Korea", "Japan"]) == 1


CONTAINED = [
    ("It is in Rome, Italy.", "rome", True),
    ("Romeo lives in Rome", "Rome", True),
    ("Romeo and Jerome", "Rome", False),
    ("about 13.5 percent", "13", False),
    ("about 13.5 percent", "5", False),
    ("about 13.5 percent", "13.5", True),
    ("首都是北京。", "北京", True),
    ("首都は東京です", "京都", False),
    ("東京都", "京都", True),
    ("", "Rome", False),
]


def test_contains_answer(subtests: pytest.Subtests) -> None:
    for text, answer, expected in CONTAINED:
        with subtests.test(f"{text}, {answer}"):
            assert contains_answer(text, [answer]) is expected


STATED = [
    ("The capital of France is Rome.", "Rome", True),
    ("**Rome** is the capital", "Rome", True),
    ("Rome.", "Rome", True),
    ("Rome!", "Rome", True),
    ("It is Romeo.", "Rome", False),
    ("It is not Rome.", "Rome", False),
    ("It isn’t Rome, but Paris.", "Rome", False),
    ("It isn't Rome, but Paris.", "Paris", True),
    ("It is Paris, not Rome.", "Rome", False),
    ("It is Rome, not Paris.", "Rome", True),
    ("The answer: Rome (not Paris).", "Rome", True),
    ("Paris rather than Rome.", "Rome", False),
    ("Rome rather than Paris.", "Rome", True),
    ("It's not, as many think, Rome.", "Rome", False),
    ("It is wrong that Rome is the capital.", "Rome", False),
    ("No, it's Rome.", "Rome", True),
    ("No doubt it is Rome.", "Rome", True),
    ("Of course! The capital is Rome.", "Rome", True),
    ("It is Paris. Rome is in Italy.", "Rome", False),
    ("It is old.\nRome.", "Rome", False),
    ("Is it Rome?", "Rome", False),
    ("Which one? It is Rome.", "Rome", True),
    ("It was written by J. R. Moss.", "Moss", True),
    ("He is Dr. Moss of St. Ives.", "St. Ives", True),
    ("The seat is Washington, D.C.", "Washington D.C.", True),
    ("It costs 1,000 dollars.", "1000", True),
    ("No.", "No", True),
    ("La capitale n'est pas Rome.", "Rome", False),
    ("日本的首都是东京。", "东京", True),
    ("不是东京。", "东京", False),
    ("首都は東京ではありません。", "東京", False),
    ("", "Rome", False),
]


def test_a_reply_states_its_answer_unless_it_denies_it(subtests: pytest.Subtests) -> None:
    for text, answer, expected in STATED:
        with subtests.test(f"{text}, {answer}"):
            assert states_answer(text, [answer]) is expected
            assert states_answer(text, ["no such answer", answer, ""]) is expected


def test_abbreviations_end_no_text(subtests: pytest.Subtests) -> None:
    texts = {"It is Rome.": True, "Written by J.": False, "He met Dr.": False, "Is it?": True}
    texts |= {"Written by J. R.": False, "In 1984.": True, "東京です。": True, "Rome": False}
    for text, expected in texts.items():
        with subtests.test(text):
            assert is_ended(text) is expected


def test_the_prompt_decides_the_judgment() -> None:
    text = "Rome, the capital of Italy"
    assert autoregressive_hit(False, text, ["Rome"])
    assert not autoregressive_hit(True, text, ["Rome"])
    assert autoregressive_hit(True, "The Rome!", ["Rome"])
    assert not autoregressive_hit(False, "The Rome!", ["Rome"])


@pytest.mark.parametrize(
    "judge", [completion_matches, answer_matches, contains_answer, states_answer, token_f1]
)
def test_answers_must_be_a_sequence_with_some_text(judge: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match=r"Write \['Rome'\]"):
        judge("Rome", "Rome")
    for nothing in ([], ["", " "]):
        with pytest.raises(ValueError, match="at least one"):
            judge("Rome", nothing)
