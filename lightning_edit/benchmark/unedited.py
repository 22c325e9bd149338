# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The unedited model: what it says to all probes of a data set, and which facts it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule
from typing_extensions import override

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.request import EditRequest
from lightning_edit.evaluation.evaluator import Baseline, Evaluation, Evaluator, ScoredProbe
from lightning_edit.evaluation.measured import gathered
from lightning_edit.evaluation.prose import perplexity, read_prose

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["UneditedRun", "from_record", "reversed_alone", "to_record"]


class UneditedRun(LightningModule):
    """Measures a model that nothing is edited in, by ``Trainer.test``.

    Args:
        model: A language model; it is only run.
        tokens: Its tokenizer.
        max_new_tokens: Longest continuation that is read.
        reads_prose: Also take its perplexity on the package's page of prose.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: PromptTokenizer,
        max_new_tokens: int,
        *,
        reads_prose: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokens = tokens
        self.max_new_tokens = max_new_tokens
        self.reads_prose = reads_prose
        #: Scores of all requests, in the order in which they came, once the test is over.
        self.evaluation = Evaluation([])
        #: Perplexity on prose, where it was asked for.
        self.perplexity: float | None = None
        self._mine: list[tuple[int, list[ScoredProbe], Baseline]] = []

    @override
    def test_step(self, batch: list[EditRequest], batch_idx: int) -> None:
        evaluator = Evaluator(self.model, self.tokens, max_new_tokens=self.max_new_tokens)
        if batch:
            found = evaluator.evaluate(batch)
            # Whole distributions are too large to be kept for a data set.
            texts = Baseline(found.baseline.texts, found.baseline.ids)
            self._mine.append((batch_idx, found.probes, texts))

    @override
    def on_test_epoch_end(self) -> None:
        texts: dict[str, str] = {}
        ids: dict[str, tuple[int, ...]] = {}
        probes: list[ScoredProbe] = []
        for _, found, baseline in sorted(gathered(self._mine), key=lambda part: part[0]):
            probes += found
            texts |= baseline.texts
            ids |= baseline.ids
        self.evaluation = Evaluation(probes, Baseline(texts, ids))
        if self.reads_prose:
            self.perplexity = perplexity(self.model, self.tokens, read_prose())


def reversed_alone(request: EditRequest) -> EditRequest:
    """A request that asks for the old answer and nothing else, by the same id."""
    return replace(request.reversed(), id=request.id, rephrases=(), locality=(), portability=())


def to_record(evaluation: Evaluation) -> dict[str, object]:
    """Scores and texts as JSON types."""
    return {
        "probes": [asdict(probe) for probe in evaluation.probes],
        "texts": dict(evaluation.baseline.texts),
        "ids": {prompt: list(ids) for prompt, ids in evaluation.baseline.ids.items()},
    }


def from_record(
    probes: Sequence[Mapping[str, object]],
    texts: Mapping[str, str],
    ids: Mapping[str, Sequence[int]],
) -> Evaluation:
    """What ``to_record`` was made of."""
    found = [_probe(row) for row in probes]
    return Evaluation(found, Baseline(texts, {prompt: tuple(row) for prompt, row in ids.items()}))


def _probe(row: Mapping[str, object]) -> ScoredProbe:
    fields = dict(row)
    answers = fields.pop("answers")
    return ScoredProbe(answers=tuple(map(str, answers)), **fields)  # type: ignore[arg-type, call-overload]
