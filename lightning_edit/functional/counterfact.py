# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""CounterFact's scores: is the new answer likelier than the old one, and only where it should be?

Shapes: B rows, one for each prompt. The authors average within a record before they average over
records; with equally many prompts in each record that is the mean over rows.
"""

from __future__ import annotations

import math

from torch import Tensor

__all__ = [
    "edit_score",
    "efficacy_magnitude",
    "efficacy_success",
    "neighborhood_magnitude",
    "neighborhood_success",
]


def efficacy_success(nll_new: Tensor, nll_old: Tensor) -> Tensor:
    """Whether the new answer has become likelier than the old one. A tie is a failure.

    CounterFact's ES on the edit prompt and PS on its paraphrases.

    Args:
        nll_new: Mean negative log-likelihood per token of the new answer, in nats, shape [B].
        nll_old: That of the old answer after the same prompts, shape [B].

    Returns:
        Float32 tensor of shape [B] of zeros and ones.

    Raises:
        ValueError: If the shapes disagree or a value is nan.

    Examples:
        >>> from torch import tensor
        >>> efficacy_success(tensor([0.5, 2.0, 1.0]), tensor([3.0, 1.0, 1.0]))
        tensor([1., 0., 0.])

    References:
        arXiv 2202.05262, section 3.3.
    """
    _check_nll(nll_new, nll_old)
    return (nll_new < nll_old).float()


def neighborhood_success(nll_new: Tensor, nll_old: Tensor) -> Tensor:
    """Whether a neighboring subject keeps its answer: the old one likelier. A tie is a failure.

    Args:
        nll_new: Mean negative log-likelihood per token of the edit's new answer after the
            neighborhood prompts, in nats, shape [B].
        nll_old: That of the old answer, which is right there, shape [B].

    Returns:
        Float32 tensor of shape [B] of zeros and ones.

    Raises:
        ValueError: If the shapes disagree or a value is nan.

    Examples:
        >>> from torch import tensor
        >>> neighborhood_success(tensor([0.5, 2.0, 1.0]), tensor([3.0, 1.0, 1.0]))
        tensor([0., 1., 0.])

    References:
        arXiv 2202.05262, section 3.3.
    """
    return efficacy_success(nll_old, nll_new)


def efficacy_magnitude(nll_new: Tensor, nll_old: Tensor) -> Tensor:
    """By how much the new answer is likelier than the old one, in probability per token.

    Args:
        nll_new: Mean negative log-likelihood per token of the new answer, in nats, shape [B].
        nll_old: That of the old answer, shape [B].

    Returns:
        Tensor of shape [B], each in [-1, 1].

    Raises:
        ValueError: If the shapes disagree or a value is nan.

    Examples:
        >>> from torch import tensor
        >>> efficacy_magnitude(tensor([0.0]), tensor([0.5]).log().neg())
        tensor([0.5000])
    """
    _check_nll(nll_new, nll_old)
    return (-nll_new).exp() - (-nll_old).exp()


def neighborhood_magnitude(nll_new: Tensor, nll_old: Tensor) -> Tensor:
    """By how much a neighboring subject's old answer is likelier, in probability per token.

    Args:
        nll_new: Mean negative log-likelihood per token of the edit's new answer, shape [B].
        nll_old: That of the old answer, which is right there, shape [B].

    Returns:
        Tensor of shape [B], each in [-1, 1].

    Raises:
        ValueError: If the shapes disagree or a value is nan.

    Examples:
        >>> from torch import tensor
        >>> neighborhood_magnitude(tensor([0.0]), tensor([0.5]).log().neg())
        tensor([-0.5000])
    """
    return efficacy_magnitude(nll_old, nll_new)


def edit_score(efficacy: float, paraphrase: float, neighborhood: float) -> float:
    """CounterFact's S: the harmonic mean of ES, PS and NS.

    Args:
        efficacy: Rate over the edit prompts, in [0, 1].
        paraphrase: Rate over the paraphrases, in [0, 1].
        neighborhood: Rate over the neighborhood prompts, in [0, 1].

    Returns:
        A number in [0, 1]: 0 if one of the rates is 0, nan if one is nan.

    Examples:
        >>> round(edit_score(1.0, 0.5, 0.5), 4)
        0.6

    References:
        arXiv 2202.05262, section 3.3.
    """
    rates = (efficacy, paraphrase, neighborhood)
    if any(math.isnan(rate) for rate in rates):
        return math.nan
    if min(rates) == 0:
        return 0.0
    return 3 / sum(1 / rate for rate in rates)


def _check_nll(nll_new: Tensor, nll_old: Tensor) -> None:
    if nll_new.shape != nll_old.shape:
        raise ValueError(
            "`nll_new` and `nll_old` are expected to have the same shape, but got "
            f"{tuple(nll_new.shape)} and {tuple(nll_old.shape)}."
        )
    if nll_new.isnan().any() or nll_old.isnan().any():
        raise ValueError(
            "`nll_new` and `nll_old` are expected to be numbers, but some are nan. "
            "A nan here usually comes from a model whose weights have overflowed."
        )
