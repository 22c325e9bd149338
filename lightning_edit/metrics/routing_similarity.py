# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Routing similarity: are tokens sent to the experts that they were sent to?"""

from __future__ import annotations

from torch import Tensor

from lightning_edit.functional.routing import routing_similarity
from lightning_edit.metrics.base import EditMetric

__all__ = ["RoutingSimilarity"]


class RoutingSimilarity(EditMetric):
    """Mean Jaccard similarity of the experts that a router picks in two models, token by token.

    An edit of a mixture of experts leaves its router alone, but what layers after it read has
    changed, so that these may send tokens to other experts. 1 means that none does.

    Args:
        kwargs: Arguments of every torchmetrics metric.

    Examples:
        >>> import torch
        >>> metric = RoutingSimilarity()
        >>> before = torch.tensor([[True, True, False], [True, True, False]])
        >>> metric.update(torch.tensor([[True, True, False], [True, False, False]]), before)
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)

    References:
        arXiv 2602.10965.
    """

    def __init__(self, **kwargs: object) -> None:
        super().__init__("routing_similarity", **kwargs)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds tokens.

        Args:
            preds: Which experts each is sent to in the edited model, [..., E] bool; see
                ``lightning_edit.passes.routing.expert_sets``.
            target: Which it is sent to in the unedited one, [..., E] bool.

        Raises:
            ValueError: If the shapes differ.
        """
        self.count_scores(self.state, routing_similarity(preds, target).flatten())
