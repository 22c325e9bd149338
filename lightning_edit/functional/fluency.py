# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Fluency of generated text: an edited model that repeats itself has few distinct n-grams."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

__all__ = ["ngram_entropy", "ngram_fluency"]


def ngram_entropy(
    tokens: Sequence[Hashable],
    n: Sequence[int] = (2, 3),
    weights: Sequence[float] = (2 / 3, 4 / 3),
) -> float:
    r"""Weighted mean entropy of the n-grams of a text, in bits.

    .. math:: \frac{1}{|N|} \sum_{n \in N} w_n \Big( -\sum_g p_n(g) \log_2 p_n(g) \Big)

    with p_n(g) the share of the n-gram g among all n-grams of the text. Tables print it times 100.
    It grows with the length of the text: compare texts of equal length.

    Args:
        tokens: Words or token ids of one text.
        n: Lengths of the n-grams.
        weights: One weight for each length.

    Returns:
        At least 0; nan if the text is shorter than the longest n-gram.

    Raises:
        TypeError: If ``tokens`` is an unsplit text.
        ValueError: If the lengths and weights do not pair up, or a length is below 1.

    Examples:
        >>> round(ngram_entropy("a b c d e".split()), 4)
        1.7233
        >>> ngram_entropy(["Rome"] * 100)
        0.0

    References:
        arXiv 2202.05262, section 3.3 (GE), after arXiv 1809.05972.
    """
    if isinstance(tokens, str):
        raise TypeError(
            "`tokens` is expected to be a sequence of words or ids, but got a text. Split it first."
        )
    if not n or len(n) != len(weights) or min(n) < 1:
        raise ValueError(
            "`n` and `weights` are expected to pair up, with lengths of at least 1, but got "
            f"{tuple(n)} and {tuple(weights)}."
        )
    if len(tokens) < max(n):
        return math.nan
    total = 0.0
    for length, weight in zip(n, weights, strict=True):
        grams = Counter(tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1))
        size = grams.total()
        total += weight * sum(count / size * math.log2(size / count) for count in grams.values())
    return total / len(n)


def ngram_fluency(
    tokens: Sequence[Hashable],
    n: Sequence[int] = (2, 3),
    weights: Sequence[float] = (2 / 3, 4 / 3),
) -> float:
    """The entropy of a text's n-grams as a share of the largest that a text of its length has.

    Args:
        tokens: Words or token ids of one text.
        n: Lengths of the n-grams.
        weights: One weight for each length.

    Returns:
        In [0, 1]: 1 where no n-gram comes twice, 0 where there is but one; nan if the text is
        too short for two of the longest n-grams.

    Raises:
        TypeError: If ``tokens`` is an unsplit text.
        ValueError: If the lengths and weights do not pair up, or a length is below 1.

    Examples:
        >>> ngram_fluency("a b c d e".split()), ngram_fluency(["Rome"] * 100)
        (1.0, 0.0)
        >>> round(ngram_fluency("a b a b a b".split()), 4)
        0.4699
    """
    entropy = ngram_entropy(tokens, n, weights)
    if len(tokens) <= max(n):
        return math.nan
    return min(1.0, entropy / ngram_entropy(range(len(tokens)), n, weights))
