# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Attribution, thresholds and the change of value vectors, against plain re-derivations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_edit.functional.knowledge_neurons import (
    coarse_neurons,
    integrated_gradients,
    integration_points,
    probability_gradient,
    refined_neurons,
    replacement,
)


def test_points_are_even_and_include_both_ends() -> None:
    assert integration_points(1).tolist() == [0.0]
    torch.testing.assert_close(integration_points(20), torch.arange(20) / 19)


def test_attributions_add_up_to_the_change_of_the_function() -> None:
    """Completeness: Σ A = F(w) − F(0) in the limit of many steps."""
    torch.manual_seed(0)
    weight, activation = torch.randn(3, 5), torch.randn(5)

    def value(w: Tensor) -> Tensor:
        return torch.softmax(torch.tanh(w) @ weight.T, -1)[..., 1]

    steps = 4001
    scaled = (integration_points(steps)[:, None] * activation).requires_grad_()
    [gradients] = torch.autograd.grad(value(scaled).sum(), scaled)
    scores = integrated_gradients(activation, gradients)
    wanted = value(activation) - value(torch.zeros(5))
    torch.testing.assert_close(scores.sum(), wanted, rtol=2e-3, atol=1e-5)


def test_layers_are_attributed_side_by_side_in_float32() -> None:
    activations = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.bfloat16)
    gradients = torch.tensor([[[1.0, 1.0], [3.0, 0.0]], [[2.0, -1.0], [2.0, 1.0]]])
    found = integrated_gradients(activations, gradients)
    assert found.dtype == torch.float32
    assert found.tolist() == [[2.0, -1.0], [1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_probability_is_that_of_autograd(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 7, dtype=dtype, requires_grad=True)
    probability, gradient = probability_gradient(logits, 3)
    wanted = torch.softmax(logits.float(), -1)[:, 3]
    [wanted_gradient] = torch.autograd.grad(wanted.sum(), logits)
    torch.testing.assert_close(probability, wanted.detach())
    torch.testing.assert_close(gradient, wanted_gradient)
    assert gradient.dtype == dtype
    assert not gradient.requires_grad


def test_thresholds_mean_what_they_are_called() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 40)
    top = float(scores.max())
    assert torch.equal(coarse_neurons(scores, 0.3), scores > 0.3 * top)
    assert torch.equal(coarse_neurons(scores, 0.3, "absolute"), scores > 0.3)
    for percent in (0.0, 37.5, 90.0, 99.9):
        limit = torch.quantile(scores, percent / 100)
        found = coarse_neurons(scores, percent, "percentile")
        assert torch.equal(found, scores > limit)
        assert int(found.sum()) == math.ceil((100 - percent) / 100 * 119)
    assert not coarse_neurons(-scores.abs(), 0.2).any()  # nothing speaks for the answer


def test_the_largest_attribution_counts_over_all_layers() -> None:
    scores = torch.tensor([[1.0, 0.3], [0.15, 0.1]])
    assert coarse_neurons(scores, 0.2).tolist() == [[True, True], [False, False]]


def test_refinement_keeps_what_more_than_a_share_of_prompts_have() -> None:
    masks = torch.tensor([[[1, 1, 1, 0]], [[1, 1, 0, 0]], [[1, 1, 0, 1]], [[1, 0, 0, 0]]]).bool()
    assert refined_neurons(masks, 0.5).tolist() == [[True, True, False, False]]
    assert refined_neurons(masks, 0.75).tolist() == [[True, False, False, False]]
    assert refined_neurons(masks, 0.0).tolist() == [[True, True, True, True]]
    assert torch.equal(refined_neurons(masks[:1], 0.5), masks[0])


@pytest.mark.parametrize("signed", [True, False])
def test_a_replacement_moves_the_output_by_the_difference_of_embeddings(signed: bool) -> None:
    torch.manual_seed(0)
    old, new = torch.randn(6), torch.randn(6)
    key = torch.tensor([1.5, 2.0, -0.5, 3.0, -1.0])
    chosen = torch.tensor([True, False, True, False, True])
    u, v = replacement(old, new, key * chosen, 2.0, signed=signed)
    moved = u @ v.T @ key
    terms = key[chosen].abs() if signed else key[chosen]
    torch.testing.assert_close(moved, 2 * terms.sum() * (new - old))
    # Of the literal form, the negative neurons take back what the others bring, or more.
    assert (float(moved @ (new - old)) > 0) == (float(terms.sum()) > 0)
    assert not (u @ v.T)[:, ~chosen].any()
