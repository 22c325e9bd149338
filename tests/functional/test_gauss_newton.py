# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Steps of Gauss-Newton against the minimum that a plain search finds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_edit.functional.gauss_newton import Terms, gauss_newton_step

E, T, D = 3, 5, 12
ONE = torch.ones(E)


def terms(delta: Tensor, rises: Tensor, at_0: Tensor, steep: Tensor, decay: float) -> Terms:
    """A loss whose margins are linear, as is the root of its divergence."""
    point = delta.clone().requires_grad_()
    nll = softplus(-(at_0 + torch.einsum("etd,ed->et", rises, point)))
    divergence = 0.5 * torch.einsum("ed,ed->e", steep, point) ** 2
    slopes = [torch.autograd.grad(nll[:, t].sum(), point, retain_graph=True)[0] for t in range(T)]
    (steepness,) = torch.autograd.grad(divergence.sum(), point)
    slopes_ETD = torch.stack(slopes, 1)
    return Terms(delta, nll.detach(), slopes_ETD, divergence.detach(), steepness, ONE, decay * ONE)


def value(at: Terms) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(at.delta, dim=1)
    return at.nll.mean(1) + at.divergence + at.decay * length


def test_steps_reach_the_minimum_where_the_network_is_linear() -> None:
    torch.manual_seed(0)
    rises, at_0, steep = torch.randn(E, T, D), -3 - torch.rand(E, T), torch.randn(E, D)
    limit, decay = 1.5 * ONE, 0.05
    delta, before = torch.zeros(E, D), torch.full((E,), torch.inf)
    for _ in range(8):
        at = terms(delta, rises, at_0, steep, decay)
        assert (value(at) <= before + 1e-4).all()
        before = value(at)
        step, gain = gauss_newton_step(at, 10 * ONE, limit)
        delta = delta + step
        assert (delta.norm(dim=1) <= limit * (1 + 1e-5)).all()
        # The model is the loss itself, but for a divergence that has no root at 0 yet.
        if at.delta.any():
            now = value(terms(delta, rises, at_0, steep, decay))
            torch.testing.assert_close(before - now, gain, rtol=1e-3, atol=1e-4)
    found = value(terms(delta, rises, at_0, steep, decay))
    plain = torch.zeros(E, D)
    for _ in range(1500):  # a plain descent in the ball
        at = terms(plain, rises, at_0, steep, decay)
        direction = plain / plain.norm(dim=1, keepdim=True).clamp_min(1e-9)
        gradient = at.slopes.mean(1) + at.divergence_slope + decay * direction
        plain = plain - 0.05 * gradient
        plain = plain * (limit / plain.norm(dim=1)).clamp_max(1.0)[:, None]
    wanted = value(terms(plain, rises, at_0, steep, decay))
    start = value(terms(torch.zeros(E, D), rises, at_0, steep, decay))
    assert (found - wanted <= 0.03 * (start - wanted)).all()


def test_a_step_is_no_longer_than_the_radius() -> None:
    torch.manual_seed(0)
    at = terms(torch.zeros(E, D), torch.randn(E, T, D), -3 * torch.ones(E, T), torch.randn(E, D), 0)
    radius = torch.tensor([1e-3, 0.1, 0.5])
    step, gain = gauss_newton_step(at, radius, 9 * ONE)
    assert (step.norm(dim=1) <= radius * (1 + 1e-5)).all()
    assert (gain > 0).all()
