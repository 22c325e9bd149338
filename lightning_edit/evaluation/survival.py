# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Whether edits hold once the edited model is quantised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.request import EditRequest
from lightning_edit.evaluation.quantised import QuantFormat, quantised
from lightning_edit.evaluation.scoring import Score, prompt_ids, score_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Survival", "measure_survival"]


@dataclass(frozen=True)
class Survival:
    """What quantising an edited model makes of one of its edits.

    Args:
        id: Of the request.
        form: The format.
        before: Probability of the new answer in the edited model.
        after: The same once that is quantised.
        took: Whether the edited model says the answer, each token after those before it.
        holds: Whether it does so once quantised.

    Examples:
        >>> Survival("a", "int4", 0.9, 0.2, took=True, holds=False).outcome
        'lost'
    """

    id: str
    form: QuantFormat
    before: float
    after: float
    took: bool
    holds: bool

    @property
    def outcome(self) -> Literal["held", "lost", "not taken"]:
        """What became of the edit; one that the edited model does not say was ``not taken``."""
        if not self.took:
            return "not taken"
        return "held" if self.holds else "lost"


def measure_survival(
    model: PreTrainedModel,
    tokens: PromptTokenizer,
    requests: Sequence[EditRequest],
    forms: Sequence[QuantFormat],
) -> list[Survival]:
    """Measures the edits of a model before and after it is quantised; it stays as it is.

    Args:
        model: The edited model.
        tokens: Its tokenizer.
        requests: What it was edited with.
        forms: Formats, each of which is tried by itself.

    Returns:
        One row for each format and request, in this order.

    Examples:
        >>> from lightning_edit import FineTune
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> editor = FineTune.from_model(*trained_tiny_model(), lr=5e-3)
        >>> editor.commit(editor.edit(tiny_requests(1)))
        >>> [row] = measure_survival(editor.model, editor.tokens, tiny_requests(1), ["q8_0"])
        >>> row.outcome
        'held'
    """
    before = _scores(model, tokens, requests)
    rows: list[Survival] = []
    for form in forms:
        with quantised(model, form):
            after = _scores(model, tokens, requests)
        for request, one, other in zip(requests, before, after, strict=True):
            said = one.argmax == one.target, other.argmax == other.target
            rows.append(Survival(request.id, form, math.exp(-one.nll), math.exp(-other.nll), *said))
    return rows


def _scores(
    model: PreTrainedModel, tokens: PromptTokenizer, requests: Sequence[EditRequest]
) -> list[Score]:
    ids = prompt_ids(model, tokens, [request.prompt for request in requests])
    pairs = [(ids[r.prompt], tokens.target(r.prompt, r.target_new, r.glued)) for r in requests]
    return score_targets(model, tokens, pairs)
