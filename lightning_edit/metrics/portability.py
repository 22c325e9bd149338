# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Portability: does the model draw the conclusions?"""

from __future__ import annotations

from lightning_edit.metrics.reading import ReadingMetric

__all__ = ["Portability"]


class Portability(ReadingMetric):
    """Mean score on questions whose answers follow from the new fact.

    Kinds of conclusions differ much in difficulty; give each its own metric by ``kind``.

    Args:
        reading: ``teacher_forced``: fraction of target tokens predicted after the right prefix.
            ``autoregressive``: whether freely generated text gives the answer. ``stated``: whether
            it states the answer, as the replies of chat models do
            ([`states_answer`][lightning_edit.functional.states_answer]). ``contains``: whether the
            answer stands anywhere in it. ``token_f1``: the words that both have, as in SQuAD.
        strict: In the teacher-forced reading, count a row only if all its tokens are right.
        kind: ``one_hop``, ``subject_alias`` or ``inverse`` if the metric is given probes of that
            kind only; becomes part of the name.
        kwargs: Arguments of every torchmetrics metric.

    Raises:
        ValueError: If the reading is unknown, ``strict`` is set for generated text, or the kind is
            not a plain word.

    Examples:
        >>> metric = Portability(reading="autoregressive", kind="one_hop")
        >>> metric.key
        'portability/one_hop/autoregressive'
        >>> metric.update(["Italian."], [["Italian"]], [True])
        >>> metric.compute()
        tensor(1., dtype=torch.float64)

    References:
        arXiv 2305.13172, section 5.1; autoregressive: arXiv 2502.11177.
    """

    name = "portability"
