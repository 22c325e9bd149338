# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Generality: are other wordings of the edit prompt answered as asked?"""

from __future__ import annotations

from lightning_edit.metrics.reading import ReadingMetric

__all__ = ["Generality"]


class Generality(ReadingMetric):
    """Mean score of the new answers on rephrased prompts.

    Args:
        reading: ``teacher_forced``: fraction of target tokens predicted after the right prefix.
            ``autoregressive``: whether freely generated text gives the answer. ``stated``: whether
            it states the answer, as the replies of chat models do
            ([`states_answer`][lightning_edit.functional.states_answer]). ``contains``: whether the
            answer stands anywhere in it. ``token_f1``: the words that both have, as in SQuAD.
        strict: In the teacher-forced reading, count a row only if all its tokens are right.
        kind: Kind of the prompts, where they are told apart; becomes part of the name.
        kwargs: Arguments of every torchmetrics metric.

    Raises:
        ValueError: If the reading is unknown, ``strict`` is set for generated text, or the kind is
            not a plain word.

    Examples:
        >>> import torch
        >>> metric = Generality(strict=True)
        >>> metric.update(torch.tensor([[0, 5, 9]]), torch.tensor([[-100, 5, 6]]))
        >>> metric.compute()
        tensor(0., dtype=torch.float64)

    References:
        arXiv 2305.13172, section 2; autoregressive: arXiv 2502.11177.
    """

    name = "generality"
