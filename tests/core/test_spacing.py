# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""White space stands where running text has it."""

from __future__ import annotations

import pytest

from lightning_edit.core.spacing import (
    continues_word,
    is_inside_word,
    space_between,
    word_starts,
)

SPACED = [
    ("The capital is", "Rome"),
    ("What is it?", "Rome"),
    ("The capital is", "Рим"),
    ("العاصمة هي", "باريس"),
    ("The capital is", "로마"),
    ("The flag is", "🇫🇷"),
    ("The code is", "123"),
    ("It is", "-5"),
    ("It is", ".5"),
    ("The suffix is", "-ase"),
    ("It lies in server 2008", "%SystemRoot%"),
    ("It is", "'s-Hertogenbosch"),
    ('Who said "yes?"', "Ada"),
    ('Who said yes?"', "Ada"),
    ('A screen of 5"', "costs"),
    ("It runs on", ".NET"),
    ("They call it", '"Rome"'),
    ("They call it", "'Rome'"),
    ("They call it", "“Rome”"),
    ("Sie heißt", "„Rom“"),
    ("De kaldte den", "»Rom«"),
    ("It is", "(Rome)"),
    ("It costs 5 €", "today"),
    ("It costs $5", "today"),
    ('The word "yes"', "means"),
    ("The word “yes”", "means"),
    ("Das Wort „ja“", "heißt"),
    ("Le mot « oui »", "veut"),
    ("The word 'yes'", "means"),
    ("the students'", "house"),
    ("Its capital -", "Rome"),
    ("Its capital —", "Rome"),
    ("Fill in: ____", "Rome"),
    ("首都是", "Rome"),
    ("The capital of Japan is", "東京"),
    ("ราคา", "500"),
]
GLUED = [
    ("The capital is ", "Rome"),
    ("The capital is", " Rome"),
    ("Capital:\n", "Rome"),
    ("It costs $", "5"),
    ("It costs €", "5"),
    ("It costs US$", "5"),
    ("Italy (capital: Rome) and France (", "Paris"),
    ("See [", "1"),
    ('He said "', "yes"),
    ('He said "yes" and then "', "no"),
    ("He said “", "yes"),
    ("He said '", "yes"),
    ("Er sagt „", "ja"),
    ("Il dit «", "oui"),
    ("Han siger »", "ja"),
    ("and/", "or"),
    ("The well-", "known"),
    ("It is -", "5"),
    ("1914–", "1918"),
    ("¿", "Qué"),
    ("France is", ", as"),
    ("France is", "."),
    ("France is", "..."),
    ("Is it France", "?"),
    ("France", "'s capital"),
    ("France", "’s capital"),
    ("(in France", ")"),
    ("He said “yes", "”"),
    ("It is 5", "%"),
    ("首都是", "罗马"),
    ("首都は", "ローマ"),
    ("首都は", "ろーま"),
    ("เมืองหลวงคือ", "โรม"),
    ("代表作是", "《红楼梦》"),
    ("人口是", "14亿"),
    ("成立于", "1949"),
    ("国旗是", "🇨🇳"),
    ("他说", "“你好”"),
    ("他说“", "你好"),
    ('他说"', "你好"),
    ("答案：", "Rome"),
    ("首都", "。"),
    ("", "Rome"),
    ("Rome", ""),
]


def test_running_text(subtests: pytest.Subtests) -> None:
    for pairs, space in ((SPACED, " "), (GLUED, "")):
        for text, more in pairs:
            with subtests.test(text + "|" + more):
                assert space_between(text, more) == space


def test_what_a_request_says() -> None:
    assert space_between("New", "castle", True) == ""
    assert space_between("It costs $", "5", False) == " "
    assert space_between("首都是", "罗马", False) == " "
    assert space_between("It is ", "Rome", False) == ""  # where one stands already
    assert space_between("It is", " Rome", False) == ""


def test_words(subtests: pytest.Subtests) -> None:
    for text, more, joined in [
        ("New", "castle", True),
        ("New ", "castle", False),
        ("New", " castle", False),
        ("19", "49", True),
        ("e", "\u0301t", True),
        ("中", "国", False),
        ("iPhone", "は", False),
        ("파리", "는", False),
        ("O'", "Brien", False),
        ("", "a", False),
        ("a", "", False),
    ]:
        with subtests.test(text + "|" + more):
            assert continues_word(text, more) is joined
    assert word_starts("In Indiana, India, Indian and India.", "India") == [12, 30]
    assert word_starts("f(x) and (f(x))", "f(x)") == [0, 10]
    assert is_inside_word("Google", 0, 2)
    assert not is_inside_word("Go is", 0, 2)
