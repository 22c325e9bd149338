# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What an editor is trained on: edits, what has to follow from them, and what has to stay."""

# Shapes: B rows, T positions.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from lightning_edit.core.batch import EditBatch, PromptTokenizer
from lightning_edit.core.errors import RequestError
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest, Probe

__all__ = ["GroupedRequests", "TrainOn", "TrainingBatch", "shared_weights"]

TrainOn = Literal["rephrase", "prompt", "both"]


@dataclass(frozen=True)
class TrainingBatch:
    """A batch of requests as an editor is trained on them.

    Args:
        inner: The edits themselves, whose gradients the editor reads; a row a request.
        outer: What the edited model is to say: rephrases, prompts, or both, with the new answers.
        outer_owners: The request that each row of ``outer`` belongs to.
        locality: What the edited model is to read as before; a row a request.
    """

    inner: EditBatch
    outer: EditBatch
    outer_owners: list[int]
    locality: EditBatch

    @classmethod
    def from_requests(
        cls,
        requests: Sequence[EditRequest],
        tokens: PromptTokenizer,
        *,
        train_on: TrainOn = "rephrase",
        turn: int = 0,
        answers_needed: bool = False,
    ) -> Self:
        """Tokenizes requests.

        Args:
            requests: Requests with a rephrase, unless ``train_on`` is ``prompt``, and a locality
                probe each.
            tokens: The tokenizer.
            train_on: What the edited model has to answer: a rephrase, the prompt itself, or both.
            turn: Of several rephrases and probes, the one whose turn it is.
            answers_needed: Whether locality probes must have answers.

        Raises:
            RequestError: If a request lacks a rephrase or a locality probe, or its answer.
        """
        asked: list[tuple[int, str]] = []
        probes: list[Probe] = []
        for i, request in enumerate(requests):
            if train_on != "rephrase":
                asked.append((i, request.prompt))
            if train_on != "prompt":
                if not request.rephrases:
                    raise RequestError(
                        f"Edit request {request.id!r} has no rephrase, on which the editor is "
                        "trained. Give it `rephrases`, or set `train_on='prompt'` (which "
                        "generalizes worse)."
                    )
                asked.append((i, request.rephrases[turn % len(request.rephrases)]))
            probes.append(_probe(request, turn, answers_needed or tokens.is_encoder_decoder))
        inner = EditBatch.from_requests(requests, tokens)
        outer = EditBatch.from_ids(
            [tokens.prompt(text) for _, text in asked],
            [tokens.target(text, requests[i].target_new, requests[i].glued) for i, text in asked],
            tokens,
        )
        locality = EditBatch.from_ids(
            [tokens.prompt(probe.prompt) for probe in probes],
            [tokens.target(p.prompt, p.answer, p.glued) if p.answer else [] for p in probes],
            tokens,
        )
        return cls(inner, outer, [i for i, _ in asked], locality)

    def to(self, device: torch.device) -> Self:
        """Moves the tensors to a device."""
        return type(self)(
            self.inner.to(device),
            self.outer.to(device),
            self.outer_owners,
            self.locality.to(device),
        )


@dataclass(frozen=True)
class GroupedRequests:
    """Requests of one step: which edit answers each, and which this process runs.

    Args:
        requests: The requests.
        batch: The same as tokens.
        groups: The edit that each belongs to, [len(requests)] int64.
        count: G, the number of edits.
        processes: Those that share the step.
        mine: Places of the requests that this process runs.
        in_training: Whether statistics go on, or the edits are only looked at.
    """

    requests: Sequence[EditRequest]
    batch: TrainingBatch
    groups: Tensor
    count: int
    processes: Processes
    mine: Sequence[int]
    in_training: bool


def _probe(request: EditRequest, turn: int, answer_needed: bool) -> Probe:
    if not request.locality:
        raise RequestError(
            f"Edit request {request.id!r} has no locality probe, by which an editor learns what to "
            "leave alone. Give it `locality`: a text that has nothing to do with the edit."
        )
    probe = request.locality[turn % len(request.locality)]
    if answer_needed and not probe.answer.strip():
        raise RequestError(
            f"Edit request {request.id!r}: the locality probe {probe.prompt!r} has no answer, at "
            "whose tokens the editor is to leave the model as it is. Give it an `answer`."
        )
    return probe


def shared_weights(mask: Tensor, owners: Tensor) -> Tensor:
    """Weights by which a sum over tokens becomes the mean over all tokens of one owner.

    Args:
        mask: True on the tokens that count, [B, T] bool.
        owners: Who each row belongs to, [B] int64.

    Returns:
        [B, T] float32; those of an owner add up to 1.

    Examples:
        >>> mask = torch.tensor([[True, True], [True, False], [True, False]])
        >>> shared_weights(mask, torch.tensor([0, 0, 1])).round(decimals=2).tolist()
        [[0.33..., 0.33...], [0.33..., 0.0], [1.0, 0.0]]
    """
    counts = mask.sum(1).to(torch.float32)
    totals = counts.new_zeros(int(owners.max()) + 1).index_add(0, owners, counts)
    return mask / totals[owners].clamp_min(1)[:, None]
