# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Closed forms of mass editing against the problems that they solve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_edit.functional.least_squares import (
    factorize,
    key_strengths,
    preserving_update,
    projected_update,
    protected_directions,
)

INPUTS, OUTPUTS = 12, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment() -> Tensor:
    keys = drawn(INPUTS, 40, seed=9) * torch.linspace(2.0, 0.1, INPUTS)[:, None]
    return keys @ keys.T / 40 + 1e-3 * torch.eye(INPUTS)


@pytest.mark.parametrize("pairs", [1, 4, 30])
def test_preserving_update_solves_the_normal_equations(pairs: int) -> None:
    keys, residuals, weight = drawn(INPUTS, pairs), drawn(OUTPUTS, pairs, seed=1), 0.7
    u, v = preserving_update(keys, residuals, factorize(moment()), weight)
    assert u.shape == (OUTPUTS, pairs)
    assert v.shape == (INPUTS, pairs)
    change = (u @ v.T).double()
    left = change @ (weight * moment().double() + keys.double() @ keys.double().T)
    torch.testing.assert_close(left, residuals.double() @ keys.double().T, rtol=1e-4, atol=1e-4)
    # No other change does better on what is minimized.

    def cost(delta: Tensor) -> Tensor:
        missed = residuals.double() - delta @ keys.double()
        return missed.square().sum() + weight * torch.trace(delta @ moment().double() @ delta.T)

    for seed in range(3):
        assert cost(change) < cost(change + 0.01 * drawn(OUTPUTS, INPUTS, seed=seed).double())


def test_without_weight_every_pair_is_stored() -> None:
    keys, residuals = drawn(INPUTS, 4), drawn(OUTPUTS, 4, seed=1)
    u, v = preserving_update(keys, residuals, factorize(moment()), 0.0)
    torch.testing.assert_close(u @ v.T @ keys, residuals, rtol=1e-4, atol=1e-4)
    # Of all changes that store them, it is the smallest in the second moment's measure.
    other = drawn(OUTPUTS, INPUTS, seed=2).double()
    other -= other @ keys.double() @ torch.linalg.pinv(keys.double())  # stores nothing
    change, c = (u @ v.T).double(), moment().double()
    assert abs(float(torch.trace(change @ c @ other.T))) < 1e-4 * float(other.norm())


def test_strengths_are_shares_of_a_pair_alone() -> None:
    keys, residuals, weight = drawn(INPUTS, 3), drawn(OUTPUTS, 3, seed=1), 2.0
    factor = factorize(moment())
    strength = key_strengths(keys, factor)
    for n in range(3):
        u, v = preserving_update(keys[:, n : n + 1], residuals[:, n : n + 1], factor, weight)
        written = u @ v.T @ keys[:, n]
        share = strength[n] / (strength[n] + weight)
        torch.testing.assert_close(written, share.float() * residuals[:, n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compressed", [False, True], ids=["keys", "gram"])
@pytest.mark.parametrize("kind", ["ridge", "projected"])
def test_batches_one_after_another_give_the_change_of_their_union(
    kind: str, compressed: bool
) -> None:
    values, keys = drawn(OUTPUTS, 9, seed=3), drawn(INPUTS, 9, seed=4)
    weight, start = 0.5, drawn(OUTPUTS, INPUTS, seed=5)
    protected, _ = protected_directions(moment(), share=0.5)

    def update(all_: Tensor, lacking: Tensor, gram: Tensor | None = None) -> Tensor:
        if kind == "ridge":
            u, v = preserving_update(all_, lacking, factorize(moment()), weight, gram)
        else:
            u, v = projected_update(all_, lacking, protected, weight, gram)
        return u @ v.T

    at_once = start + update(keys, values - start @ keys)
    current = start.clone()
    for begin in (0, 3, 6):
        new = slice(begin, begin + 3)
        lacking = values[:, new] - current @ keys[:, new]
        old = keys[:, :begin]
        if compressed:
            current += update(keys[:, new], lacking, old.double() @ old.double().T)
        else:
            current += update(keys[:, : begin + 3], lacking)
    torch.testing.assert_close(current, at_once, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pairs", [3, 40])
def test_projected_update_is_nothing_on_protected_directions(pairs: int) -> None:
    keys, residuals = drawn(INPUTS, pairs), drawn(OUTPUTS, pairs, seed=1)
    protected, gap = protected_directions(moment(), share=0.6)
    assert 0 < gap < 1
    u, v = projected_update(keys, residuals, protected, 0.3)
    change = u @ v.T
    assert change.norm() > 0.1
    assert (change @ protected).norm() < 1e-5 * change.norm()
    # The plain form of the paper.
    project = torch.eye(INPUTS).double() - protected.double() @ protected.double().T
    k = keys.double()
    plain = torch.linalg.solve(
        project @ k @ k.T + 0.3 * torch.eye(INPUTS).double(), project @ k @ residuals.double().T
    ).T
    torch.testing.assert_close(change.double(), plain, rtol=1e-4, atol=1e-5)


def test_directions_by_threshold_and_by_share() -> None:
    c = torch.diag(torch.tensor([5.0, 3.0, 1.5, 0.5]))
    assert protected_directions(c, threshold=1.0)[0].shape == (4, 3)
    assert protected_directions(c, share=0.5)[0].shape == (4, 1)
    assert protected_directions(c, share=0.51)[0].shape == (4, 2)
    none, gap = protected_directions(c, threshold=10.0)
    assert none.shape == (4, 0)
    assert gap == 1.0
    with pytest.raises(ValueError, match=r"All 4 directions .* Raise `nullspace_threshold`"):
        protected_directions(c, threshold=0.1)


def test_what_cannot_be_solved_says_so() -> None:
    with pytest.raises(ValueError, match="positive definite"):
        factorize(torch.zeros(3, 3))
    row = drawn(1, 3).double()
    with pytest.raises(ValueError, match="positive definite"):
        factorize(row.T @ row)  # singular, whatever the sign of its rounded pivots
    twice = drawn(INPUTS, 1).expand(INPUTS, 2)
    with pytest.raises(ValueError, match="two requests may be about the same subject"):
        preserving_update(twice, drawn(OUTPUTS, 2), factorize(torch.eye(INPUTS)), 0.0)
