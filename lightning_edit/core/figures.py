# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Figures of an edit: what its computation came to, request by request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from torch import Tensor

__all__ = ["EditDetails", "RequestFigures", "not_taken"]


class RequestFigures(TypedDict, total=False):
    """What an edit came to for one request. Primitives only: checkpoints and reports keep them.

    A method gives what it knows beside the id: what it searched, never what came of it. That,
    ``loss``, ``p_target`` and ``took``, is measured on the written model, whatever the method.
    """

    id: str
    #: Why the method failed on the request, which is then no part of the edit.
    failed: str
    #: Mean NLL of the new answer's tokens after the prompt in the written model, in nats.
    loss: float
    #: exp(−loss): the geometric mean of these tokens' probabilities.
    p_target: float
    #: Whether each of these tokens is the written model's likeliest after those before it.
    took: bool
    #: Loss in nats at the last step of the search or of the training that looked at it, with all
    #: its terms, such as penalties and an end token, and the steps made.
    searched_loss: float
    steps: int
    #: As ``p_target``, where the search expected the edit to bring it.
    searched_p_target: float
    #: ‖Δ‖ (Frobenius) of the request's part of the edit.
    norm: float
    #: Seconds of the edit, shared out evenly among its requests.
    seconds: float
    #: Share of the pair that ridge regression writes, averaged over layers.
    written_share: float
    #: How far the prompt's tokens are still sent to the experts of later layers that they were sent
    #: to, 1 for all, where a model has such; see ``RoutingSimilarity``.
    routing_similarity: float
    #: Share of the residual's norm that is left by the projection on the null space.
    projected_share: float
    #: Entry of the memory that answers the request, and how it got there.
    entry: str
    placed: str
    dropped: list[str]
    overrides: list[str]
    similarity: float
    #: Activation distances of the request and of other text, by which WISE tells them apart.
    distance: float
    distance_other: float
    #: Tokens of the prompt as the model is asked it, with the facts that are told before.
    prompt_tokens: int
    #: Neurons that were changed, and patches that were added.
    neurons: int
    patches: int
    #: Block of slots that was trained on the request, and the answer's calibration score.
    block: str
    cka: float


class EditDetails(TypedDict, total=False):
    """What a computation left beside the edit, to be looked at; not saved.

    ``requests`` and ``failed`` are there for every method, the rest where it is made.
    """

    #: Figures of each request that the edit answers, in their order.
    requests: list[RequestFigures]
    #: Reasons of the requests that are left out, by id.
    failed: dict[str, str]
    #: Why the edit was taken back once it was written; its requests are among those that failed.
    taken_back: str
    #: What locate-then-edit methods found and wrote, by layer where there are several.
    target_values: Any
    layer: int
    keys: dict[Any, Tensor]
    residuals: dict[int, Tensor]
    figures: dict[int, dict[str, Tensor]]
    neurons: Any
    #: Loss of each request at each step, in nats.
    losses: list[list[float]]
    #: What UltraEdit takes, and makes of it, by the parameter's name.
    gradients: dict[str, Tensor]
    normalized_keys: dict[str, Tensor]
    normalized_gradients: dict[str, Tensor]
    values: dict[str, Tensor]


def not_taken(rows: Sequence[RequestFigures]) -> list[str]:
    """Ids of the requests whose new answer the written model does not give, token by token.

    Args:
        rows: Figures of requests. Those that failed count; those that were not measured do not.

    Examples:
        >>> not_taken([{"id": "a", "took": True}, {"id": "b", "took": False}, {"id": "c"}])
        ['b']
    """
    return [row["id"] for row in rows if "failed" in row or not row.get("took", True)]
