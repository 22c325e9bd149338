# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The readings of an edited model: fed with the right prefix, or left to write by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_edit.functional.matching import (
    autoregressive_hit,
    contains_answer,
    states_answer,
    token_f1,
)
from lightning_edit.functional.metrics import token_accuracy
from lightning_edit.metrics.base import EditMetric

__all__ = ["Reading", "ReadingMetric", "answer_scores", "default_readings"]

Reading = Literal["teacher_forced", "autoregressive", "stated", "contains", "token_f1"]

# Readings that judge a generated text by its answers alone, whatever was asked.
_JUDGES: Mapping[str, Callable[[str, Sequence[str]], float]] = MappingProxyType(
    {"stated": states_answer, "contains": contains_answer, "token_f1": token_f1}
)


def default_readings(in_chat: bool = False) -> tuple[Reading, ...]:
    """Readings to take where none are named: of a chat, also whether replies state the answer.

    Args:
        in_chat: Whether the model is asked in a chat template.
    """
    return ("teacher_forced", "autoregressive", *(("stated",) if in_chat else ()))


def answer_scores(
    key: str,
    preds: Sequence[str],
    target: Sequence[Sequence[str]],
    question: Sequence[bool] | None,
) -> list[float]:
    """Whether each generated text gives the answer, or another spelling of it.

    Args:
        key: Name of the metric, for errors.
        preds: Generated texts.
        target: For each text the answer and its other spellings.
        question: For each text whether its prompt is a question.

    Raises:
        ValueError: If ``question`` is missing.
    """
    if question is None:
        raise ValueError(
            f"{key}: `question` is needed to judge generated text. Say for each text whether its "
            "prompt is a question."
        )
    rows = zip(question, preds, target, strict=True)
    return [float(autoregressive_hit(*row)) for row in rows]


class ReadingMetric(EditMetric):
    """Base of the four metrics that exist in several readings.

    Subclasses set ``name``, and ``text_scores`` where texts are judged otherwise.

    Args:
        reading: ``teacher_forced``: fraction of target tokens predicted after the right prefix.
            ``autoregressive``: whether freely generated text gives the answer. ``stated``: whether
            it states the answer, as the replies of chat models do
            ([`states_answer`][lightning_edit.functional.states_answer]). ``contains``: whether the
            answer stands anywhere in it. ``token_f1``: the words that both have, as in SQuAD.
        strict: In the teacher-forced reading, count a row only if all its tokens are right.
        kind: Kind of the probes, where only those of one kind are given; becomes part of the name.
        kwargs: Arguments of every torchmetrics metric.

    Raises:
        ValueError: If the reading is unknown, ``strict`` is set for generated text, or the kind is
            not a plain word.
    """

    name: ClassVar[str]
    #: Readings that there are.
    readings: ClassVar[tuple[Reading, ...]] = get_args(Reading)
    #: Judges generated texts, by the arguments of ``update`` after the metric's own key.
    text_scores: ClassVar[staticmethod[..., list[float]]] = staticmethod(answer_scores)

    def __init__(
        self,
        reading: Reading = "teacher_forced",
        strict: bool = False,
        kind: str | None = None,
        **kwargs: object,
    ) -> None:
        if reading not in self.readings:
            *others, last = map(repr, self.readings)
            raise ValueError(
                f"`reading` is expected to be {', '.join(others)} or {last}, but got {reading!r}."
            )
        if strict and reading != "teacher_forced":
            raise ValueError(
                "`strict` concerns the tokens of the teacher-forced reading; generated text is "
                "right or wrong as a whole. Leave it out."
            )
        if kind is not None and not kind.isidentifier():
            raise ValueError(
                f"`kind` is expected to be a word such as 'one_hop', but got {kind!r}."
            )
        parts = (self.name, kind, f"{reading}_strict" if strict else reading)
        super().__init__(key="/".join(part for part in parts if part), **kwargs)
        self.reading = reading
        self.strict = strict
        self.kind = kind

    def update(
        self,
        preds: Tensor | Sequence[str],
        target: Tensor | Sequence[Sequence[str]],
        question: Sequence[bool] | None = None,
    ) -> None:
        """Adds rows.

        Args:
            preds: Teacher-forced: predicted token ids [B, T] or logits [B, T, V], aligned with the
                target. Otherwise: B generated texts.
            target: Teacher-forced: target token ids [B, T], -100 where nothing is to be predicted.
                Otherwise: for each text the answer and its other spellings.
            question: Autoregressive: for each text whether its prompt is a question.

        Raises:
            TypeError: If tensors are given to the autoregressive reading or texts to the other.
            ValueError: If lengths or shapes disagree.
        """
        if self.reading == "teacher_forced":
            if not isinstance(preds, Tensor) or not isinstance(target, Tensor):
                raise TypeError(
                    f"{self.key}: `preds` and `target` are expected to be tensors of token ids, "
                    f"but got {type(preds).__name__} and {type(target).__name__}. For generated "
                    "texts use `reading='autoregressive'`."
                )
            scores = token_accuracy(preds, target, strict=self.strict)
        else:
            if isinstance(preds, (Tensor, str)) or isinstance(target, (Tensor, str)):
                raise TypeError(
                    f"{self.key}: `preds` and `target` are expected to be sequences of texts, but "
                    f"got {type(preds).__name__} and {type(target).__name__}. For token ids use "
                    "`reading='teacher_forced'`."
                )
            lengths = [len(rows) for rows in (preds, target, question) if rows is not None]
            if len(set(lengths)) > 1:
                raise ValueError(
                    f"{self.key}: `preds`, `target` and `question` are expected to be of one "
                    f"length, but got {lengths}."
                )
            judge = _JUDGES.get(self.reading)
            if judge is not None:
                texts = [float(judge(*row)) for row in zip(preds, target, strict=True)]
            else:
                texts = self.text_scores(self.key, preds, target, question)
            scores = torch.tensor(texts, dtype=torch.float32)
        self.count_scores(self.state, scores)
