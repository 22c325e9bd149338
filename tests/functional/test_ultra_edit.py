# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The normalizer against plain statistics, the closed form against the system as it is printed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_edit.functional.ultra_edit import (
    Normalizer,
    normalize,
    ridge_factors,
    ridge_update,
    update_normalizer,
)


def rows_of(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(shape[-1], generator=generator) * 3
    return torch.randn(*shape, generator=generator) * scale + 5


def updated(rows: Tensor, sizes: list[int], *, biased_variance: bool = False) -> Normalizer:
    found = None
    for part in torch.split(rows, sizes):
        found = update_normalizer(found, part, biased_variance=biased_variance)
    assert found is not None
    return found


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1, 1, 10], [1] * 12])
def test_statistics_are_those_of_all_rows_whatever_their_split(sizes: list[int]) -> None:
    rows = rows_of(12, 6)
    found = updated(rows, sizes)
    assert int(found.total) == 12
    torch.testing.assert_close(found.mean, rows.double().mean(0))
    torch.testing.assert_close(found.squares, 11 * rows.double().var(0))
    wanted = (rows - rows.mean(0)) / rows.std(0)
    torch.testing.assert_close(normalize(rows, found, eps=1e-7), wanted, atol=1e-4, rtol=1e-4)


def plain_authors_form(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The update as the paper's code does it, line by line."""
    n, mean, var = 0, torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for part in parts:
        x, b = part.double(), len(part)
        step = x.mean(0) - mean
        mean = mean + b * step / (n + b)
        var = var + b * x.var(0) + n * b * step**2 / (n + b)
        n += b
    return mean, var


def test_the_biased_form_is_the_authors_and_depends_on_the_split() -> None:
    rows = rows_of(12, 6)
    found = {}
    for sizes in ([12], [5, 7], [2, 3, 7]):
        ours = updated(rows, sizes, biased_variance=True)
        mean, var = plain_authors_form(list(torch.split(rows, sizes)))
        torch.testing.assert_close(ours.mean, mean)
        torch.testing.assert_close(ours.squares, var)
        found[len(sizes)] = ours.squares
    exact = updated(rows, [12]).squares
    torch.testing.assert_close(found[1], exact * 12 / 11)
    assert bool((found[2] > found[1]).all())
    assert bool((found[3] > found[1]).all())


def test_statistics_are_not_changed_in_place() -> None:
    first = update_normalizer(None, rows_of(3, 6))
    kept = [tensor.clone() for tensor in first]
    update_normalizer(first, rows_of(4, 6, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_a_lone_row_has_no_unbiased_variance() -> None:
    assert torch.equal(update_normalizer(None, rows_of(1, 6)).squares, torch.zeros(6).double())
    with pytest.raises(ValueError, match=r"at least 2 rows, of which `biased_variance`.*got 1"):
        update_normalizer(None, rows_of(1, 6), biased_variance=True)
    with pytest.raises(ValueError, match="at least 1 rows, but got 0"):
        update_normalizer(None, rows_of(0, 6))


def test_epsilon_stands_in_both_places() -> None:
    rows = rows_of(4, 3)
    moments = update_normalizer(None, rows)
    eps = 0.25
    wanted = (rows - rows.mean(0)) / ((3 * rows.var(0) / (3 + eps)).sqrt() + eps)
    torch.testing.assert_close(normalize(rows, moments, eps), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("count", "is_factored"), [(1, True), (4, True), (5, False), (9, False), (25, False)]
)
@pytest.mark.parametrize("ridge", [1.0, 0.1])
def test_the_update_solves_the_system_of_the_paper(
    count: int, is_factored: bool, ridge: float
) -> None:
    inputs, outputs = 10, 8
    keys, values = rows_of(count, inputs), rows_of(count, outputs, seed=1)
    h, v = keys.double(), values.double()
    wanted = torch.linalg.solve(h.T @ h + ridge * torch.eye(inputs).double(), h.T @ v).T.float()
    found = ridge_update(keys, values, ridge)
    assert isinstance(found, tuple) == is_factored
    change = found[0] @ found[1].T if isinstance(found, tuple) else found
    assert change.dtype == torch.float32
    torch.testing.assert_close(change, wanted, atol=1e-4, rtol=1e-4)
    u, w = ridge_factors(keys, values, ridge)
    torch.testing.assert_close(u @ w.T, wanted, atol=1e-4, rtol=1e-4)


def test_keys_that_repeat_are_no_obstacle() -> None:
    key = rows_of(1, 10)
    u, v = ridge_factors(key.repeat(3, 1), torch.ones(3, 8), ridge=1.0)
    square = float(key.square().sum())
    torch.testing.assert_close(
        (u @ (v.T @ key[0])), torch.full((8,), 3 * square / (1 + 3 * square))
    )


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("count", [1, 30])
def test_a_ridge_has_to_be_positive(ridge: float, count: int) -> None:
    with pytest.raises(ValueError, match="`ridge` is expected to be above 0"):
        ridge_update(torch.ones(count, 10), torch.ones(count, 8), ridge)
