# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Reliability, generality, locality and portability in both readings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_edit.metrics import Generality, Locality, Portability, Reliability
from lightning_edit.metrics.reading import ReadingMetric

FOUR: list[type[ReadingMetric]] = [Generality, Locality, Portability, Reliability]
JUDGED: list[type[ReadingMetric]] = [Generality, Portability, Reliability]
TARGET = torch.tensor([[-100, 5, 6, 7], [-100, -100, 8, 9], [-100, -100, -100, 4]])
PREDS = torch.tensor([[0, 5, 6, 0], [0, 0, 8, 9], [0, 0, 0, 0]])


@pytest.mark.parametrize("cls", FOUR)
def test_teacher_forced(cls: type[ReadingMetric]) -> None:
    metric, strict = cls(), cls(strict=True)
    metric.update(PREDS, TARGET)
    strict.update(PREDS, TARGET)
    # Rows weigh equally, however long: (2/3 + 1 + 0) / 3.
    assert metric.compute().item() == pytest.approx(5 / 9, abs=1e-7)
    assert strict.compute().item() == pytest.approx(1 / 3)
    assert metric.count() == 3
    logits = torch.nn.functional.one_hot(PREDS, 10).float()
    again = cls()
    again.update(logits, TARGET)
    assert again.compute() == metric.compute()


@pytest.mark.parametrize("cls", JUDGED)
def test_autoregressive(cls: type[ReadingMetric]) -> None:
    metric = cls(reading="autoregressive")
    metric.update(
        [" Rome, of course", "Rome, of course", "Rome.", "東京です。"],
        [["Rome"], ["Rome"], ["Roma", "Rome"], ["東京"]],
        [False, True, True, False],
    )
    assert metric.compute() == 0.75
    metric.update([" Paris"], [["Rome"]], question=[False])
    assert metric.compute() == 0.6
    assert metric.count() == 5


def test_locality_compares_texts_with_the_unedited_model() -> None:
    metric = Locality(reading="autoregressive")
    metric.update([" Madrid. ", "Berlin", "berlin", ""], ["Madrid.", "Berlin", "Berlin", ""])
    assert metric.compute() == 0.75
    metric.update(["x"], ["y"], [True])
    assert metric.compute() == 0.6
    with pytest.raises(TypeError, match="texts of the unedited model"):
        metric.update(["Madrid"], [["Madrid"]])


@pytest.mark.parametrize("cls", FOUR)
def test_names(cls: type[ReadingMetric]) -> None:
    word = cls.__name__.lower()
    assert cls().key == f"{word}/teacher_forced"
    assert cls("autoregressive").key == f"{word}/autoregressive"
    assert cls(strict=True).key == f"{word}/teacher_forced_strict"
    assert cls(kind="inverse").key == f"{word}/inverse/teacher_forced"
    assert set(cls().metric_state) == {f"{word}_teacher_forced_sum", f"{word}_teacher_forced_n"}


def wrong_constructor(**kwargs: Any) -> None:
    Portability(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"reading": "generated"},
            "autoregressive, stated, contains, token_f1, but got 'generated'",
        ),
        ({"reading": "autoregressive", "strict": True}, "right or wrong as a whole"),
        ({"kind": "one.hop"}, "'one_hop', but got 'one.hop'"),
        ({"kind": ""}, "`kind`"),
        ({"window": 3}, "`window`"),
    ],
)
def test_wrong_constructors(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong_constructor(**kwargs)


@pytest.mark.parametrize("cls", FOUR)
def test_a_reading_refuses_the_other_ones_inputs(cls: type[ReadingMetric]) -> None:
    forced, free = cls(), cls(reading="autoregressive")
    with pytest.raises(TypeError, match="reading='autoregressive'"):
        forced.update(["Rome"], [["Rome"]], [False])
    with pytest.raises(TypeError, match="reading='teacher_forced'"):
        free.update(PREDS, TARGET)
    with pytest.raises(TypeError, match="sequences of texts"):
        free.update("Rome", [["Rome"]], [False])
    for preds, target, question in (
        (["a", "b"], ["a"], [True, True]),
        (["a", "b"], ["a", "b"], [True]),
        (["a"], ["a"], []),
    ):
        with pytest.raises(ValueError, match="one length"):
            free.update(preds, target, question)
    assert (forced.count(), free.count()) == (0, 0)


@pytest.mark.parametrize("cls", JUDGED)
def test_questions_must_be_told_from_completions(cls: type[ReadingMetric]) -> None:
    with pytest.raises(ValueError, match="`question` is needed"):
        cls(reading="autoregressive").update(["Rome"], [["Rome"]])
    with pytest.raises(TypeError, match=r"Write \['Rome'\]"):
        cls(reading="autoregressive").update(["Rome"], ["Rome"], [False])
