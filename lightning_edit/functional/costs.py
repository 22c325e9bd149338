# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What editing costs, by arithmetic: operations, bytes and seconds of parts of a method."""

# Shapes: R rows of tokens, of which P are of the prompt and T from the subject's end on; M inputs
# and D outputs of an edited matrix W [D, M].

from __future__ import annotations

__all__ = [
    "KEYS_BESIDE_SUM",
    "carried_bytes",
    "dense_operations",
    "gathered_bytes",
    "reduced_bytes",
    "roofline_seconds",
    "search_bytes",
    "solve_operations",
    "sum_bytes",
]

#: Keys of earlier edits that wait beside the sum of outer products: one in so many dimensions.
KEYS_BESIDE_SUM = 16


def dense_operations(weights: int, tokens: float, *, backward: bool = False) -> float:
    """Floating-point operations of linear maps over tokens: 2 a weight and token.

    Back to the inputs it is as many again; the weights' own gradients are not asked for.

    Args:
        weights: Entries of the matrices.
        tokens: How many tokens go through them.
        backward: Whether a gradient comes back.

    Examples:
        >>> dense_operations(100, 3), dense_operations(100, 3, backward=True)
        (600, 1200)
    """
    return (4 if backward else 2) * weights * tokens


def solve_operations(inputs: int, keys: int) -> tuple[float, float]:
    """Operations in float64 of C⁻¹ K: those of C's Cholesky factor, made once, and of each K.

    Args:
        inputs: M.
        keys: Columns of K.

    Examples:
        >>> solve_operations(3, 2)
        (9.0, 36)
    """
    return inputs**3 / 3, 2 * inputs**2 * keys


def sum_bytes(outputs: int, inputs: int, terms: int, block: int = 64) -> int:
    """Bytes of the sum of changes of rank one: factors, or a matrix where that is smaller.

    Beside the factors of many terms lies what the first of them come to, so that a write costs the
    last block of them alone.

    Args:
        outputs: D.
        inputs: M.
        terms: How many there are.
        block: Terms that are multiplied out at once.

    Examples:
        >>> sum_bytes(100, 100, 1), sum_bytes(200, 200, 90), sum_bytes(200, 200, 1000)
        (800, 304000, 160000)
    """
    whole = 4 * outputs * inputs
    if 2 * terms > min(outputs, inputs):
        return whole
    return 4 * (outputs + inputs) * terms + (whole if terms > block else 0)


def carried_bytes(inputs: int, keys: int) -> int:
    """Bytes of the keys of earlier edits, which some methods carry from edit to edit.

    Up to half of their dimensions they are kept in float32; then the sum of their outer products
    is, in float64, beside the last few.

    Args:
        inputs: M.
        keys: How many there are.

    Examples:
        >>> carried_bytes(64, 10), carried_bytes(64, 1000)
        (2560, 33792)
    """
    if keys <= inputs // 2:
        return 4 * inputs * keys
    return 8 * inputs**2 + 4 * inputs * (inputs // KEYS_BESIDE_SUM)


def search_bytes(hidden: int, inner: int, vocabulary: int, rows: int, tail: int, depth: int) -> int:
    """Bytes that a pass of a target value's search keeps for the way back, in float32.

    Of each token and block: inputs of norms and of attention, and the two factors of a gated MLP
    with their product. Of each row: the vocabulary, as logits, their logarithms and a gradient.

    Args:
        hidden: Width between blocks.
        inner: Inputs of the MLP's last map.
        vocabulary: Outputs of the last projection.
        rows: R.
        tail: T.
        depth: Blocks from the edited one on.

    Examples:
        >>> search_bytes(8, 32, 100, rows=2, tail=3, depth=4)
        20832
    """
    return 4 * (rows * tail * depth * (12 * hidden + 3 * inner) + 3 * rows * vocabulary)


def roofline_seconds(operations: float, moved: float, rate: float, bandwidth: float) -> float:
    """Seconds of work that computes and moves at the same time: those of the longer of both.

    Args:
        operations: Floating-point operations.
        moved: Bytes read and written.
        rate: Operations a second.
        bandwidth: Bytes a second.

    Examples:
        >>> roofline_seconds(100.0, 10.0, rate=50.0, bandwidth=1.0)
        10.0

    References:
        Roofline: An Insightful Visual Performance Model, Williams, Waterman and Patterson 2009.
    """
    return max(operations / rate, moved / bandwidth)


def gathered_bytes(weights: int, devices: int) -> float:
    """Bytes that each of several devices receives to have the others' parts of weights (FSDP).

    Args:
        weights: Bytes of the weights.
        devices: How many devices share them.

    Examples:
        >>> gathered_bytes(100, 1), gathered_bytes(100, 4)
        (0.0, 75.0)
    """
    return weights * (devices - 1) / devices


def reduced_bytes(activations: float, devices: int) -> float:
    """Bytes that each of several devices receives to add activations up in a ring (TP).

    Args:
        activations: Bytes of the activations.
        devices: How many devices add theirs.

    Examples:
        >>> reduced_bytes(100.0, 1), reduced_bytes(100.0, 4)
        (0.0, 150.0)
    """
    return 2 * activations * (devices - 1) / devices
