# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Causal tracing: which states of a model bring a fact back when its subject is made unreadable.

Meng et al., NeurIPS 2022 (arXiv 2202.05262), section 2.
"""

# Shapes: F facts, S noisy copies, N subject tokens, T tokens, L layers, D hidden.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import EditError, ModelError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.plain_model import check_ids, check_weights
from lightning_edit.core.request import EditRequest, check_subjects
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.tracing.restoration import KINDS, CorruptedRun, Kind, Restoration

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "POSITIONS",
    "FactTrace",
    "TracingResult",
    "TracingSettings",
    "propose_layers",
    "subject_deviation",
    "trace_facts",
]

#: Classes of tokens that effects are averaged over.
POSITIONS = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)


@dataclass(frozen=True)
class TracingSettings:
    """How facts are traced.

    Args:
        samples: Noisy copies of a prompt.
        noise_factor: Standard deviation of the noise as a multiple of that of the embeddings of
            the subjects' tokens.
        window: Layers whose MLP or attention outputs are restored together.
        seed: Seed of the noise, which is the same in each fact.
        max_rows: Rows of a batch at most, as far as the samples allow.

    Raises:
        ValueError: If a number is not positive.
    """

    samples: int = 10
    noise_factor: float = 3.0
    window: int = 10
    seed: int = 0
    max_rows: int = 1024

    def __post_init__(self) -> None:
        for name in ("samples", "noise_factor", "window", "max_rows"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"`{name}` is expected to be more than 0, but got {value}.")

    def restoration(self, kind: Kind, layer: int, layers: int) -> Restoration:
        """What is restored around a layer: its hidden state, or a window of MLPs or attentions.

        Args:
            kind: What is restored.
            layer: The middle of the window.
            layers: Layers of the model, over whose ends no window reaches.

        Examples:
            >>> TracingSettings(window=10).restoration("mlp", 7, 30)
            Restoration(kind='mlp', start=2, stop=12)
        """
        if kind == "hidden":
            return Restoration(kind, layer, layer + 1)
        start = max(0, layer - self.window // 2)
        return Restoration(kind, start, min(layers, layer + (self.window + 1) // 2))


@dataclass(frozen=True, eq=False)
class FactTrace:
    """One fact: how likely its answer is with each state restored.

    Args:
        id: Of the request.
        prompt: The prompt, as the model reads it.
        subject: Text of the subject.
        answer: The token that the model answers with.
        tokens: The prompt's T tokens as text.
        subject_range: First token of the subject, and one more than the last.
        high: Probability of the answer in the clean run.
        low: Its mean probability with the subject corrupted.
        scores: Its mean probability with the states of a token restored around a layer, by kind,
            [T, L] float32 each.
    """

    id: str
    prompt: str
    subject: str
    answer: str
    tokens: tuple[str, ...]
    subject_range: tuple[int, int]
    high: float
    low: float
    scores: dict[Kind, Tensor]

    def indirect_effect(self, kind: Kind) -> Tensor:
        """What restoring adds to the answer's probability, [T, L]."""
        return self.scores[kind] - self.low

    def positions(self) -> dict[str, list[int]]:
        """Tokens of each class; a subject of one token is both its first and its last."""
        start, stop = self.subject_range
        last = len(self.tokens) - 1
        after = [stop] if stop <= last else []
        found = ([start], [*range(start + 1, stop - 1)], [stop - 1], after)
        return dict(zip(POSITIONS, (*found, [*range(stop + 1, last)], [last]), strict=True))


class TracingRecord(TypedDict):
    """A ``TracingResult`` as plain JSON types.

    Args:
        settings: How the facts were traced, with the deviation.
        unknown: Ids of the requests whose old answer the model does not give.
        average_indirect_effect: By kind and class of tokens, [L] each.
        facts: The fields of each ``FactTrace``.
    """

    settings: dict[str, float]
    unknown: list[str]
    average_indirect_effect: dict[Kind, dict[str, list[float | None]]]
    facts: list[dict[str, object]]


@dataclass(frozen=True, eq=False)
class TracingResult:
    """Traces of the facts that a model knows.

    Args:
        facts: One trace for each of them.
        unknown: Ids of the requests whose old answer the model does not give.
        deviation: Standard deviation of the embeddings of the subjects' tokens.
        settings: How they were traced.
    """

    facts: list[FactTrace]
    unknown: list[str]
    deviation: float
    settings: TracingSettings = field(default_factory=TracingSettings)

    def average(self, kind: Kind) -> Tensor:
        """Average indirect effect by class of tokens, in probability.

        Args:
            kind: What was restored.

        Returns:
            [6, L] float32 in the order of ``POSITIONS``; nan where no fact has such tokens.

        Raises:
            EditError: If there are no facts.
        """
        if not self.facts:
            raise EditError(
                f"No fact was traced: of {len(self.unknown)} requests the model knows no old "
                "answer. Give requests whose `target_old` the model says."
            )
        rows = []
        for position in POSITIONS:
            effects = [
                fact.indirect_effect(kind)[fact.positions()[position]].mean(0)
                for fact in self.facts
                if fact.positions()[position]
            ]
            layers = self.facts[0].scores[kind].shape[1]
            rows.append(
                torch.stack(effects).mean(0) if effects else torch.full((layers,), torch.nan)
            )
        return torch.stack(rows)

    def to_dict(self) -> TracingRecord:
        """The result as plain JSON types, with averages beside the facts."""

        def plain(tensor: Tensor) -> list[list[float | None]]:
            return [[round(v, 6) if v == v else None for v in row] for row in tensor.tolist()]

        facts: list[dict[str, object]] = []
        for fact in self.facts:
            scores = {kind: plain(tensor) for kind, tensor in fact.scores.items()}
            names = ("id", "prompt", "subject", "answer", "tokens", "subject_range", "high", "low")
            facts.append({**{name: getattr(fact, name) for name in names}, "scores": scores})
        average = {
            kind: dict(zip(POSITIONS, plain(self.average(kind)), strict=True))
            for kind in (self.facts[0].scores if self.facts else ())
        }
        return {
            "settings": {**asdict(self.settings), "deviation": self.deviation},
            "unknown": self.unknown,
            "average_indirect_effect": average,
            "facts": facts,
        }


def trace_facts(
    model: PreTrainedModel,
    tokens: PromptTokenizer,
    requests: Sequence[EditRequest],
    settings: TracingSettings | None = None,
    *,
    deviation: float | None = None,
    noise: Tensor | None = None,
) -> TracingResult:
    """Traces the facts that a model knows: which states bring the answer back.

    The subject's embeddings get noise, and the answer's probability drops from high to low. Then
    the clean states of one token are put back, layer by layer, and the probability is measured
    again: hidden states of one layer, or MLP or attention outputs of a window of layers. A fact
    is known if the model's most likely next token begins its ``target_old``; of a request without
    one it is whatever the model answers.

    Args:
        model: A decoder-only model, which is read in eval mode.
        tokens: Its tokenizer.
        requests: Facts; their new answers play no part.
        settings: How to trace.
        deviation: Standard deviation that the noise is a multiple of; measured on the subjects of
            the requests when None.
        noise: Standard normal noise for the first N subject tokens, [S, N, D]; drawn from the
            seed when None.

    Returns:
        The traces of the known facts, in the order of the requests.

    Raises:
        ModelError: If the model has an encoder, or cannot be run block by block, or weights are
            quantized or offloaded.
        RequestError: If a subject is not named or not found.

    Examples:
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> model, tokenizer = trained_tiny_model()
        >>> result = trace_facts(model, PromptTokenizer(tokenizer), tiny_requests(1))
        >>> fact = result.facts[0]
        >>> fact.answer, fact.tokens[slice(*fact.subject_range)], fact.high > fact.low
        (' Dorin', (' Velmora',), True)
        >>> fact.scores["mlp"].shape  # tokens, layers
        torch.Size([5, 4])

    References:
        Locating and Editing Factual Associations in GPT, arXiv 2202.05262, section 2.1.
    """
    settings = settings or TracingSettings()
    check_weights(model)
    tree = ModelTree.of(model)
    check_subjects(requests, "Causal tracing")
    if deviation is None:
        deviation = subject_deviation(tree, tokens, [request.subject for request in requests])
    facts: list[FactTrace] = []
    unknown: list[str] = []
    with borrowed(model):
        for request in requests:
            ids, subject = tokens.subject_range(
                request.prompt, request.subject, start=request.subject_start
            )
            check_ids(model, tokens, [ids])
            drawn = _noise(settings, len(subject), tree.hidden_size) if noise is None else noise
            scaled = settings.noise_factor * deviation * drawn[:, : len(subject)]
            run = CorruptedRun(tree, ids, subject, scaled)
            old = request.target_old
            if (
                old is not None
                and tokens.target(request.prompt, old, request.glued)[0] != run.answer
            ):
                unknown.append(request.id)
                continue
            if not facts:
                run.check()
            scores = {kind: torch.full((len(ids), len(tree.blocks)), run.low) for kind in KINDS}
            for token in range(subject.start, len(ids)):
                for kind, layer, score in _restored(run, token, settings):
                    scores[kind][token, layer] = score
            decode = tokens.tokenizer.decode
            facts.append(
                FactTrace(
                    id=request.id,
                    prompt=tokens.render(request.prompt),
                    subject=request.subject,
                    answer=decode([run.answer]),
                    tokens=tuple(decode([i]) for i in ids),
                    subject_range=(subject.start, subject.stop),
                    high=run.high,
                    low=run.low,
                    scores=scores,
                )
            )
    return TracingResult(facts, unknown, deviation, settings)


def subject_deviation(tree: ModelTree, tokens: PromptTokenizer, subjects: Sequence[str]) -> float:
    """Standard deviation of all entries of the embeddings of the subjects' tokens.

    Args:
        tree: Where the embedding is.
        tokens: The tokenizer.
        subjects: Texts, tokenized by themselves and without special tokens.
    """
    if tree.input_embeddings is None:
        raise ModelError(f"{type(tree.model).__name__} has no token embeddings to corrupt.")
    rows = [tokens.tokenizer(text, add_special_tokens=False)["input_ids"] for text in subjects]
    device = next(tree.blocks[0].parameters()).device
    ids = torch.tensor([i for row in rows for i in row], device=device)
    with torch.no_grad():
        return float(tree.input_embeddings(ids).float().std()) if len(ids) else 0.0


#: Share of what corrupting took that MLPs must bring back at the subject to be worth editing.
LEAST_SHARE = 0.1


def propose_layers(result: TracingResult, count: int = 5) -> list[int]:
    """Layers worth editing: those around the MLPs' largest effect at the subject's last token.

    A heuristic: where restoring MLP outputs brings a fact back is where its recall is decided,
    but edits of other layers often do as well or better (arXiv 2301.04213). Take it as the middle
    of a search.

    Args:
        result: Of a model that knows at least one fact.
        count: How many layers to propose, such as 1 for ROME and 5 for MEMIT.

    Returns:
        Consecutive layers; none where MLPs do not hold the facts: where restoring them brings back
        less than ``LEAST_SHARE`` of what corrupting the subject took from the answer's probability.

    Raises:
        EditError: If no fact was traced.
        ValueError: If there are not so many layers.
    """
    effects_L = result.average("mlp")[POSITIONS.index("last subject token")]
    layers = len(effects_L)
    if not 1 <= count <= layers:
        raise ValueError(f"`count` is expected to be from 1 to {layers}, but got {count}.")
    taken = sum(fact.high - fact.low for fact in result.facts) / len(result.facts)
    if not float(effects_L.max()) >= LEAST_SHARE * taken > 0:
        return []
    start = min(max(0, int(effects_L.argmax()) - count // 2), layers - count)
    return list(range(start, start + count))


def _noise(settings: TracingSettings, tokens: int, hidden_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randn(settings.samples, tokens, hidden_size, generator=generator)


def _restored(
    run: CorruptedRun, token: int, settings: TracingSettings
) -> Iterator[tuple[Kind, int, float]]:
    """Scores of all kinds and layers of a token, in batches of limited size."""
    layers = len(run.tree.blocks)
    wanted = [(k, i, settings.restoration(k, i, layers)) for k in KINDS for i in range(layers)]
    wanted.sort(key=lambda item: item[2].entry)
    size = max(1, settings.max_rows // run.samples)
    for at in range(0, len(wanted), size):
        part = wanted[at : at + size]
        scores = run.restore(token, [restoration for _, _, restoration in part]).tolist()
        yield from ((kind, i, score) for (kind, i, _), score in zip(part, scores, strict=True))
