# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""CounterFact's rates: is the new answer likelier than the old one, and only where it should be?"""

from __future__ import annotations

from torch import Tensor

from lightning_edit.functional.counterfact import (
    edit_score,
    efficacy_success,
    neighborhood_success,
)
from lightning_edit.metrics.base import CountingMetric, EditMetric

__all__ = ["EditScore", "EfficacySuccess", "NeighborhoodSuccess", "ParaphraseSuccess"]


class _NewIsLikelier(EditMetric):
    """How often the new answer is likelier than the old one.

    Args:
        key: Name in collections and reports.
        kwargs: Arguments of every torchmetrics metric.
    """

    def update(self, nll_new: Tensor, nll_old: Tensor) -> None:
        """Adds rows.

        Args:
            nll_new: Mean negative log-likelihood per token of the new answer, shape [B].
            nll_old: That of the old answer after the same prompts, shape [B].
        """
        self.count_scores(self.state, efficacy_success(nll_new, nll_old))


class EfficacySuccess(_NewIsLikelier):
    """ES: how often the new answer is likelier than the old one on the edit prompt.

    Args:
        kwargs: Arguments of every torchmetrics metric.

    Examples:
        >>> import torch
        >>> metric = EfficacySuccess()
        >>> metric.update(torch.tensor([0.5, 2.0]), torch.tensor([3.0, 1.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)

    References:
        arXiv 2202.05262, section 3.3.
    """

    def __init__(self, **kwargs: object) -> None:
        super().__init__(key="efficacy_success", **kwargs)


class ParaphraseSuccess(_NewIsLikelier):
    """PS: how often the new answer is likelier than the old one on a paraphrase.

    The authors average within each record first; where records have different numbers of
    paraphrases, hand the means of the records to ``update_scores``.

    Args:
        kwargs: Arguments of every torchmetrics metric.

    Examples:
        >>> import torch
        >>> metric = ParaphraseSuccess()
        >>> metric.update(torch.tensor([0.5, 1.0]), torch.tensor([3.0, 1.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)

    References:
        arXiv 2202.05262, section 3.3.
    """

    def __init__(self, **kwargs: object) -> None:
        super().__init__(key="paraphrase_success", **kwargs)


class NeighborhoodSuccess(EditMetric):
    """NS: how often a neighboring subject's old, right answer stays the likelier one.

    The authors average within each record first; where records have different numbers of
    neighbors, hand the means of the records to ``update_scores``.

    Args:
        kwargs: Arguments of every torchmetrics metric.

    Examples:
        >>> import torch
        >>> metric = NeighborhoodSuccess()
        >>> metric.update(torch.tensor([0.5, 2.0]), torch.tensor([3.0, 1.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)

    References:
        arXiv 2202.05262, section 3.3.
    """

    def __init__(self, **kwargs: object) -> None:
        super().__init__(key="neighborhood_success", **kwargs)

    def update(self, nll_new: Tensor, nll_old: Tensor) -> None:
        """Adds rows.

        Args:
            nll_new: Mean negative log-likelihood per token of the edit's new answer, shape [B].
            nll_old: That of the old answer after the same neighborhood prompts, shape [B].
        """
        self.count_scores(self.state, neighborhood_success(nll_new, nll_old))


class EditScore(CountingMetric):
    """S: the harmonic mean of the rates ES, PS and NS.

    Args:
        kwargs: Arguments of every torchmetrics metric.

    Examples:
        >>> import torch
        >>> metric = EditScore()
        >>> metric.update(
        ...     efficacy=torch.ones(2),
        ...     paraphrase=torch.tensor([1.0, 0.0]),
        ...     neighborhood=torch.tensor([0.0, 1.0]),
        ... )
        >>> metric.compute()
        tensor(0.6000, dtype=torch.float64)

    References:
        arXiv 2202.05262, section 3.3.
    """

    key = "edit_score"
    _parts = ("efficacy", "paraphrase", "neighborhood")

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        for part in self._parts:
            self.add_counter(f"{self.key}_{part}")

    def update(
        self,
        efficacy: Tensor | None = None,
        paraphrase: Tensor | None = None,
        neighborhood: Tensor | None = None,
    ) -> None:
        """Adds rows, as many to each rate as there are prompts.

        Args:
            efficacy: Scores in [0, 1] of edit prompts, shape [B].
            paraphrase: Scores of paraphrases, shape [B'].
            neighborhood: Scores of neighborhood prompts, shape [B''].
        """
        for part, scores in zip(self._parts, (efficacy, paraphrase, neighborhood), strict=True):
            if scores is not None:
                self.count_scores(f"{self.key}_{part}", scores)

    def compute(self) -> Tensor:
        """The harmonic mean of the three rates, in [0, 1]; nan while one has no rows."""
        rates = (self.rate(f"{self.key}_{part}")[0] for part in self._parts)
        return self.as_tensor(edit_score(*rates))
