# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Measures a model against edit requests: all probes of all requests in a few batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.request import EditRequest, is_question
from lightning_edit.core.spacing import continues_word
from lightning_edit.evaluation.greedy import Continuation
from lightning_edit.evaluation.scoring import (
    Score,
    continuations,
    prompt_ids,
    score_targets,
)
from lightning_edit.functional.counterfact import efficacy_success, neighborhood_success
from lightning_edit.functional.matching import (
    autoregressive_hit,
    contains_answer,
    states_answer,
    token_f1,
)
from lightning_edit.functional.metrics import kl_divergence
from lightning_edit.metrics.reading import Reading, default_readings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Baseline", "Evaluation", "Evaluator", "ScoredProbe"]


@dataclass(frozen=True)
class ScoredProbe:
    """One prompt, what the model made of it, and its scores.

    Args:
        request_id: The edit request that it belongs to.
        metric: ``reliability``, ``generality``, ``locality`` or ``portability``.
        kind: Kind of the probe; empty for reliability and generality.
        prompt: What was asked.
        answers: Right answers; for locality the unedited model's own text is what counts.
        text: The greedy continuation.
        teacher_forced: Share of the answer's tokens predicted right, in [0, 1].
        exact: Whether all of them were.
        autoregressive: Whether the continuation gives the answer.
        stated: Whether it states the answer, as a reply in a chat; not for locality.
        contains: Whether the answer stands anywhere in it; not for locality.
        token_f1: F1 of the words that it and the answer share, in [0, 1]; not for locality.
        nll_new: Mean negative log-likelihood of the new answer's tokens, in nats; for portability
            of the probe's own answer.
        nll_old: The same of the old answer.
        kl: KL(unedited ‖ now) of the next token, in nats (locality).
        glued: Whether the answers follow the prompt without a space, where the request says it.
    """

    request_id: str
    metric: str
    kind: str
    prompt: str
    answers: tuple[str, ...]
    text: str = ""
    teacher_forced: float | None = None
    exact: bool | None = None
    autoregressive: bool | None = None
    stated: bool | None = None
    contains: bool | None = None
    token_f1: float | None = None
    nll_new: float | None = None
    nll_old: float | None = None
    kl: float | None = None
    glued: bool | None = None


class _Scores(TypedDict, total=False):
    """Fields of a ``ScoredProbe`` that are worked out."""

    text: str
    teacher_forced: float
    exact: bool
    autoregressive: bool | None
    stated: bool
    contains: bool
    token_f1: float
    nll_new: float
    nll_old: float
    kl: float


#: What an answer is scored for: agreement with it, or its likelihood.
_Use = Literal["answer", "nll_new", "nll_old"]


@dataclass(frozen=True)
class Baseline:
    """Frozen outputs of the unedited model on locality prompts.

    Args:
        texts: Prompt to greedy continuation.
        ids: Prompt to the tokens of that continuation.
        first: Prompt to log-probabilities of the next token, [V] float32.
    """

    texts: Mapping[str, str]
    ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    first: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Evaluation:
    """Scores of all probes of some requests.

    Args:
        probes: In the order of the requests.
        baseline: The unedited model's outputs that locality was measured against.
    """

    probes: list[ScoredProbe]
    baseline: Baseline = field(default_factory=lambda: Baseline({}))

    def update(self, metrics: MetricCollection) -> None:
        """Adds the scores to metrics with the keys of ``edit_metrics``."""
        members: Iterable[tuple[str, Any]] = metrics.items(keep_base=True)
        for name, metric in members:
            known = probe_scores(self.probes, name)
            if known:
                metric.update_scores(torch.tensor(known, dtype=torch.float64))

    def of(self, request_id: str) -> Iterator[ScoredProbe]:
        """The probes of one request."""
        return (probe for probe in self.probes if probe.request_id == request_id)

    def mean(self, key: str) -> tuple[float, int]:
        """Mean of a score that is not a rate, such as ``locality/kl``, and its number of rows."""
        metric, _, name = key.partition("/")
        values = [getattr(p, name) for p in self.probes if p.metric == metric]
        known = [v for v in values if v is not None]
        return (math.fsum(known) / len(known) if known else math.nan), len(known)


_FIELDS = {
    "teacher_forced": "teacher_forced",
    "teacher_forced_strict": "exact",
    "autoregressive": "autoregressive",
    "stated": "stated",
    "contains": "contains",
    "token_f1": "token_f1",
}


def probe_score(probe: ScoredProbe, key: str) -> float | None:
    """A probe's score under a metric's key, or None where the metric does not take the probe.

    Args:
        probe: A scored probe.
        key: ``<metric>/<reading>`` or ``portability/<kind>/<reading>``, where the metric may be
            one of CounterFact's ``efficacy_success``, ``paraphrase_success`` and
            ``neighborhood_success``.
    """
    metric, *kind, reading = key.split("/")
    counterfact = {
        "efficacy_success": "reliability",
        "paraphrase_success": "generality",
        "neighborhood_success": "locality",
    }
    if metric in counterfact:
        if probe.metric != counterfact[metric] or probe.nll_new is None or probe.nll_old is None:
            return None
        if probe.metric == "locality" and probe.kind != "neighborhood":
            return None
        new, old = torch.tensor([probe.nll_new]), torch.tensor([probe.nll_old])
        success = neighborhood_success if probe.metric == "locality" else efficacy_success
        return float(success(new, old)[0])
    if probe.metric != metric or (kind and probe.kind != kind[0]):
        return None
    score = getattr(probe, _FIELDS[reading])
    return None if score is None else float(score)


def probe_scores(probes: Iterable[ScoredProbe], key: str) -> list[float]:
    """Scores of all probes that a metric takes.

    ``multi_hop`` probes of one request are wordings of one question, which counts once, by the one
    that does best (arXiv 2305.14795, section 4.2).

    Args:
        probes: Scored probes.
        key: As in ``probe_score``.
    """
    found: list[float] = []
    best: dict[str, float] = {}
    for probe in probes:
        score = probe_score(probe, key)
        if score is None:
            continue
        if probe.kind == "multi_hop":
            best[probe.request_id] = max(score, best.get(probe.request_id, 0.0))
        else:
            found.append(score)
    return [*found, *best.values()]


class Evaluator:
    """Asks a model everything that edit requests are judged by.

    Args:
        model: A Hugging Face language model, edited or not; it is only run.
        tokens: Its tokenizer.
        readings: Readings to take; when None, ``teacher_forced`` and ``autoregressive``, and in a
            chat template ``stated``, too.
        max_new_tokens: Longest continuation that is read, in tokens.
        max_tokens: Tokens run at once.
        chat_template: Ask in the chat template (True) or bare (False), whatever ``tokens`` does;
            as ``tokens`` does when None.

    Examples:
        >>> from lightning_edit.core.batch import PromptTokenizer
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> model, tokenizer = trained_tiny_model()
        >>> evaluator = Evaluator(model, PromptTokenizer(tokenizer))
        >>> requests = tiny_requests(2)
        >>> baseline = evaluator.baseline(requests)
        >>> evaluation = evaluator.evaluate(requests, baseline)
        >>> {p.autoregressive for p in evaluation.probes if p.metric == "locality"}
        {True}
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: PromptTokenizer,
        *,
        readings: Sequence[Reading] | None = None,
        max_new_tokens: int = 24,
        max_tokens: int = 2048,
        chat_template: bool | None = None,
    ) -> None:
        self.model = model
        self.tokens = tokens.in_form(chat_template)
        in_chat = self.tokens.chat_template
        self.readings = default_readings(in_chat) if readings is None else tuple(readings)
        self.max_new_tokens = max_new_tokens
        self.max_tokens = max_tokens

    def continuations(self, prompts: Sequence[str]) -> list[str]:
        """Greedy continuations up to a natural stop; see ``scoring.continuations``."""
        return [written.text for written in self._continue(prompts)]

    def _continue(self, prompts: Sequence[str]) -> list[Continuation]:
        return continuations(self.model, self.tokens, prompts, max_new_tokens=self.max_new_tokens)

    def baseline(self, requests: Sequence[EditRequest]) -> Baseline:
        """Freezes what the unedited model says to the locality prompts.

        Args:
            requests: Requests whose locality will be measured.
        """
        prompts = [probe.prompt for request in requests for probe in request.locality]
        unique = list(dict.fromkeys(prompts))
        if not unique:
            return Baseline({})
        written = dict(zip(unique, self._continue(unique), strict=True))
        ids = prompt_ids(self.model, self.tokens, unique)
        pairs = [(ids[prompt], [self.tokens.pad_id]) for prompt in unique]
        scores = self._score(pairs, [True] * len(unique))
        first = {p: s.first for p, s in zip(unique, scores, strict=True) if s.first is not None}
        return Baseline(
            {prompt: said.text for prompt, said in written.items()},
            {prompt: said.ids for prompt, said in written.items()},
            first,
        )

    def evaluate(
        self, requests: Sequence[EditRequest], baseline: Baseline | None = None
    ) -> Evaluation:
        """Scores every probe of every request.

        Locality is agreement with the unedited model: under teacher forcing, on the first tokens
        of its own continuation, as many as the probe's answer has; autoregressively, on the whole
        continuation.

        Args:
            requests: Requests to be judged by; their edits may be in the model or not.
            baseline: What the unedited model said to their locality prompts. When None, this
                model counts as the unedited one; the result carries its baseline.
        """
        known: dict[tuple[str, int], str] = {}
        if baseline is None:
            baseline = self.baseline(requests)
            known = {(prompt, 1): text for prompt, text in baseline.texts.items()}
        probes = [probe for request in requests for probe in _expand(request)]
        scored: list[_Scores] = [{} for _ in probes]
        if not probes:
            return Evaluation([], baseline)
        if set(self.readings) - {"teacher_forced"}:
            written = self._written(probes, known)
            for probe, fields, said in zip(probes, scored, written, strict=True):
                fields["text"] = said.text
                if "autoregressive" in self.readings:
                    fields["autoregressive"] = self._hit(probe, said, baseline)
                if probe.metric != "locality":
                    fields.update(self._judged(said.text, probe.answers))
        if "teacher_forced" in self.readings:
            by_id = {request.id: request for request in requests}
            self._add_teacher_forced(probes, scored, by_id, baseline)
        return Evaluation(
            [replace(p, **fields) for p, fields in zip(probes, scored, strict=True)],
            baseline,
        )

    def _written(
        self, probes: Sequence[ScoredProbe], known: Mapping[tuple[str, int], str]
    ) -> list[Continuation]:
        # Locality compares texts, so that no answer decides where they stop.
        least = [1 if p.metric == "locality" else self._longest(p) for p in probes]
        asked = [(probe.prompt, n) for probe, n in zip(probes, least, strict=True)]
        todo = [
            item
            for probe, item in zip(probes, asked, strict=True)
            if probe.metric != "locality" or item not in known
        ]
        written = continuations(
            self.model,
            self.tokens,
            [prompt for prompt, _ in todo],
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=[n for _, n in todo],
        )
        found = {item: Continuation(text, ()) for item, text in known.items()}
        found |= dict(zip(todo, written, strict=True))
        return [found[item] for item in asked]

    def _judged(self, text: str, answers: Sequence[str]) -> _Scores:
        """What is said of a text by its answers alone, in the readings that are taken."""
        found = _Scores()
        if "stated" in self.readings:
            found["stated"] = states_answer(text, answers)
        if "contains" in self.readings:
            found["contains"] = contains_answer(text, answers)
        if "token_f1" in self.readings:
            found["token_f1"] = token_f1(text, answers)
        return found

    def _hit(self, probe: ScoredProbe, said: Continuation, baseline: Baseline) -> bool | None:
        if probe.metric == "locality":
            before = baseline.texts.get(probe.prompt)
            return None if before is None else said.text.strip() == before.strip()
        asks = is_question(probe.prompt)
        begins_anew = asks or self.tokens.chat_template or self.tokens.is_encoder_decoder
        answers: Sequence[str] = probe.answers
        if not begins_anew and continues_word(probe.prompt, said.text):
            # "Newcastle" is not what "New castle" is.
            answers = [
                answer
                for answer in answers
                if (self.tokens.leading_space(probe.prompt, answer, probe.glued) + answer)[
                    :1
                ].isspace()
                == said.is_spaced
            ]
        return bool(answers) and autoregressive_hit(asks, said.text, answers)

    def _add_teacher_forced(
        self,
        probes: Sequence[ScoredProbe],
        scored: Sequence[_Scores],
        by_id: Mapping[str, EditRequest],
        baseline: Baseline,
    ) -> None:
        """Adds accuracies, likelihoods and divergences; one pass over all of them."""
        pairs: list[tuple[list[int], list[int]]] = []
        owner: list[tuple[int, _Use]] = []
        ids = prompt_ids(self.model, self.tokens, [probe.prompt for probe in probes])
        for i, probe in enumerate(probes):
            prompt = ids[probe.prompt]
            request = by_id[probe.request_id]
            for use, target in self._targets(probe, request, baseline).items():
                pairs.append((prompt, target))
                owner.append((i, use))
        with_first = [use == "answer" and probes[i].metric == "locality" for i, use in owner]
        for (i, use), score in zip(owner, self._score(pairs, with_first), strict=True):
            fields = scored[i]
            if use != "answer":
                fields[use] = score.nll
                continue
            hits = [a == b for a, b in zip(score.argmax, score.target, strict=True)]
            fields["teacher_forced"] = sum(hits) / len(hits)
            fields["exact"] = all(hits)
            reference = baseline.first.get(probes[i].prompt)
            if score.first is not None and reference is not None:
                fields["kl"] = float(kl_divergence(reference[None], score.first[None])[0])

    def _targets(
        self, probe: ScoredProbe, request: EditRequest, baseline: Baseline
    ) -> dict[_Use, list[int]]:
        """Answers whose tokens are scored after the probe's prompt, by what they are for."""

        def target(prompt: str, answer: str) -> list[int]:
            return self.tokens.target(prompt, answer, probe.glued)

        found: dict[_Use, list[int]] = {}
        if probe.metric == "locality":
            said = baseline.ids.get(probe.prompt)
            if said:
                wanted = len(target(probe.prompt, probe.answers[0])) if probe.answers[0] else 1
                found["answer"] = list(said[:wanted])
            # A neighbor whose own answer is the new one keeps it, whatever is likelier.
            if probe.kind == "neighborhood" and probe.answers[0] not in ("", request.target_new):
                found["nll_old"] = target(probe.prompt, probe.answers[0])
                found["nll_new"] = target(probe.prompt, request.target_new)
            return found
        found["answer"] = found["nll_new"] = target(probe.prompt, probe.answers[0])
        if request.target_old and probe.metric != "portability":
            found["nll_old"] = target(probe.prompt, request.target_old)
        return found

    def _longest(self, probe: ScoredProbe) -> int:
        answers = [a for a in probe.answers if a.strip()]
        return max(
            (len(self.tokens.target(probe.prompt, a, probe.glued)) for a in answers), default=1
        )

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], with_first: Sequence[bool]
    ) -> list[Score]:
        return score_targets(
            self.model, self.tokens, pairs, with_first=with_first, max_tokens=self.max_tokens
        )


def _expand(request: EditRequest) -> Iterator[ScoredProbe]:
    """A request as the prompts it is judged by, unscored."""
    new = (request.target_new,)
    yield ScoredProbe(request.id, "reliability", "", request.prompt, new, glued=request.glued)
    for prompt in request.rephrases:
        yield ScoredProbe(request.id, "generality", "", prompt, new, glued=request.glued)
    for metric in ("locality", "portability"):
        for probe in getattr(request, metric):
            about = (request.id, metric, probe.kind, probe.prompt, probe.answers)
            yield ScoredProbe(*about, glued=probe.glued)
