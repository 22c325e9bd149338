# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Steps of many searches at once, from the value and the slope of each of their terms."""

# Shapes: E searches, T terms of each, D dimensions, K candidates for a step, B = T + 2 directions.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["Terms", "gauss_newton_step"]

ITERATIONS = 15  # of the solution in B dimensions
# Strengths of the pulls to where a search stands and to 0, by which candidates differ, as shares of
# the largest squared slope.
HERE = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
ORIGIN = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
ENOUGH = 0.9  # of the best candidate's gain, for which the shortest is taken
SMALLEST = 1e-6  # likelihoods are not told from 1 below, nor divergences from 0


@dataclass(frozen=True)
class Terms:
    """A loss w · mean of l + d + c ‖δ‖ of each search, by its terms where the search stands.

    Args:
        delta: δ, [E, D].
        nll: l, negative log-likelihoods, [E, T].
        slopes: Their gradients, [E, T, D].
        divergence: d, [E].
        divergence_slope: Its gradient, [E, D].
        factor: w, [E].
        decay: c, [E].
    """

    delta: Tensor
    nll: Tensor
    slopes: Tensor
    divergence: Tensor
    divergence_slope: Tensor
    factor: Tensor
    decay: Tensor


def gauss_newton_step(at: Terms, radius: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """A step in a model of the loss that knows what is curved in it, but not in the network.

    The network is taken for linear in what it says: in the margin m of each likelihood, whose loss
    l = log (1 + exp (-m)) keeps its shape, and in the root of twice the divergence. The minimum of
    that model lies in the span of the terms' slopes. It is found there for several pulls to where
    the search stands and to 0; of the candidates, cut to both balls, the shortest of the good ones
    is taken.

    Args:
        at: Where the searches stand.
        radius: Longest step, [E].
        limit: Largest ‖δ‖, [E].

    Returns:
        The steps, [E, D] float32, and by how much the model says that the losses fall, [E].

    Examples:
        >>> slope = torch.tensor([[[-1.0, 0.0]]])
        >>> none, one = torch.zeros(1), torch.ones(1)
        >>> at = Terms(torch.zeros(1, 2), one[None] * 3, slope, none, torch.zeros(1, 2), one, none)
        >>> step, gain = gauss_newton_step(at, one * 9, one * 2)
        >>> step.round(decimals=2) + 0.0, bool(gain > 1.5)
        (tensor([[2., 0.]]), True)

    References:
        The convex function of a linearized map, under a bound on the step: Drusvyatskiy & Paquette,
        arXiv 1605.00125. The bound on the curvature of l: Jaakkola & Jordan, 2000.
    """
    terms = at.nll.shape[1]
    nll, delta = at.nll.double().clamp_min(SMALLEST), at.delta.double()
    margin_E1T = -torch.log(torch.expm1(nll.clamp_max(300.0)))[:, None]
    rises = at.slopes.double() / torch.expm1(-nll)[..., None]
    root = (2 * at.divergence.double().clamp_min(0)).sqrt()[:, None]
    steep = torch.where(root > SMALLEST, at.divergence_slope.double() / root, 0.0)
    basis = torch.cat([rises, steep[:, None], delta[:, None]], 1)
    gram = basis @ basis.mT
    weight = (at.factor.double() / terms)[:, None, None]
    length = torch.linalg.vector_norm(delta, dim=-1)
    # ‖δ‖ is taken for a square that touches it, and is not so sharp at 0.
    own = at.decay.double() / torch.maximum(length, limit.double() / 10)
    scale = weight[:, 0, 0] * at.slopes.double().square().sum(-1).amax(1)
    grid = torch.cartesian_prod(torch.tensor(HERE), torch.tensor(ORIGIN)).double().to(gram.device)
    origin = scale[:, None] * grid[:, 1] + own[:, None]
    pull = (scale[:, None] * grid[:, 0] + origin)[..., None].clamp_min(1e-12)

    def said(moves: Tensor) -> tuple[Tensor, Tensor]:
        """Margins and root after moves of the directions' values, [E, K, B]."""
        return margin_E1T + moves[..., :terms], root[..., None] + moves[..., terms : terms + 1]

    still = torch.zeros_like(pull)
    a = pull.new_zeros(*pull.shape[:2], terms + 2)  # the steps, in the basis
    for _ in range(ITERATIONS):
        margins, roots = said(a @ gram)
        slope = torch.cat([-weight * torch.sigmoid(-margins), roots, origin[..., None]], -1)
        size = margins.abs().clamp_min(SMALLEST)
        bend = torch.cat([weight * torch.tanh(size / 2) / (2 * size), still + 1, still], -1)
        system = bend[..., None] * gram[:, None] + torch.diag_embed(pull.expand_as(bend))
        a = a - torch.linalg.solve_ex(system, slope + pull * a)[0]

    def norm(coefficients: Tensor) -> Tensor:
        squares = (coefficients @ gram * coefficients).sum(-1, keepdim=True)
        return squares.clamp_min(1e-30).sqrt()

    def value(coefficients: Tensor, lengths: Tensor) -> Tensor:
        margins, roots = said(coefficients @ gram)
        likely = (weight * softplus(-margins)).sum(-1)
        return likely + roots[..., 0].square() / 2 + at.decay.double()[:, None] * lengths[..., 0]

    unit = torch.zeros_like(a)
    unit[..., -1] = 1.0  # δ itself
    a = (a + unit) * (limit.double()[:, None, None] / norm(a + unit)).clamp_max(1.0) - unit
    a = a * (radius.double()[:, None, None] / norm(a)).clamp_max(1.0)
    before = value(torch.zeros_like(a[:, :1]), length[:, None, None])
    gain = before - value(a, norm(a + unit))
    gain = torch.where(gain.isfinite(), gain, -torch.inf)
    is_good = gain >= ENOUGH * gain.amax(1, keepdim=True)
    chosen = torch.where(is_good, norm(a)[..., 0], torch.inf).argmin(1)
    every = torch.arange(len(chosen), device=chosen.device)
    step = (a[every, chosen][:, None] @ basis)[:, 0]
    return step.float(), gain[every, chosen].float()
