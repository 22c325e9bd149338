# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Locality: does everything else stay as it was?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lightning_edit.metrics.reading import Reading, ReadingMetric

__all__ = ["Locality", "same_text_scores"]


def same_text_scores(
    key: str,
    preds: Sequence[str],
    target: Sequence[Sequence[str]],
    question: Sequence[bool] | None,
) -> list[float]:
    """Whether each text equals that of the unedited model, but for space around it.

    Args:
        key: Name of the metric, for errors.
        preds: Texts of the edited model.
        target: A text of the unedited model for each.
        question: Does not matter.

    Raises:
        TypeError: If ``target`` holds anything but texts.
    """
    texts = [text for text in target if isinstance(text, str)]
    if len(texts) != len(target):
        raise TypeError(
            f"{key}: `target` is expected to hold the texts of the unedited model, one for each "
            f"prompt, but got {list(target)!r}."
        )
    return [float(now.strip() == before.strip()) for now, before in zip(preds, texts, strict=True)]


class Locality(ReadingMetric):
    """Mean agreement with the unedited model on prompts outside the edit's scope.

    The targets are what the unedited model said, taken before the first edit: token ids in the
    teacher-forced reading, and in the autoregressive one a text for each prompt, which must be
    equal but for space around it. Whether it was right does not matter.

    Args:
        reading: ``teacher_forced``: fraction of positions predicted as before. ``autoregressive``:
            whether the freely generated text is the same.
        strict: In the teacher-forced reading, count a row only if all its tokens agree.
        kind: Kind of the probes, where they are told apart; becomes part of the name.
        kwargs: Arguments of every torchmetrics metric.

    Raises:
        ValueError: If the reading is unknown, ``strict`` is set for generated text, or the kind is
            not a plain word.

    Examples:
        >>> metric = Locality(reading="autoregressive")
        >>> metric.update([" Madrid.", " Berlin."], target=[" Madrid.", " Bonn."])
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)

    References:
        arXiv 2305.13172, section 2; autoregressive: arXiv 2502.11177.
    """

    name = "locality"
    readings: ClassVar[tuple[Reading, ...]] = ("teacher_forced", "autoregressive")

    text_scores: ClassVar[staticmethod[..., list[float]]] = staticmethod(same_text_scores)
