# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Fluency: does a model still write, or does it repeat itself?"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch

from lightning_edit.functional.fluency import ngram_fluency
from lightning_edit.metrics.base import EditMetric

__all__ = ["Fluency"]


class Fluency(EditMetric):
    """Mean entropy of the bigrams and trigrams of generated texts, as a share of the largest.

    A model that an edit has ruined writes the same few words again and again, and the entropy of
    its n-grams (the papers' GE) falls far below that of the unedited one. As a share of the entropy
    of a text that repeats nothing it hardly depends on the length.

    Args:
        kwargs: Arguments of every torchmetrics metric.

    Examples:
        >>> metric = Fluency()
        >>> metric.update(["a b c d e".split(), ["Rome"] * 5])
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)

    References:
        arXiv 2202.05262, section 3.3 (GE), after arXiv 1809.05972.
    """

    def __init__(self, **kwargs: object) -> None:
        super().__init__(key="fluency", **kwargs)

    def update(self, preds: Sequence[Sequence[Hashable]]) -> None:
        """Adds texts; those that are too short for two trigrams do not count.

        Args:
            preds: Generated texts, each as its words or token ids.

        Raises:
            TypeError: If a text is not split.
        """
        known = [share for share in map(ngram_fluency, preds) if not math.isnan(share)]
        self.count_scores(self.state, torch.tensor(known, dtype=torch.float64))
