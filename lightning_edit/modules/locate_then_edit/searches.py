# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""How target values are searched: what is made of a pass, and where the next one looks."""

# Shapes: E requests, T context templates, N = E (T + 1) rows, C outputs that change, D hidden.

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from lightning_edit.functional.adam import adam_step, clamp_norm
from lightning_edit.functional.gauss_newton import Terms, gauss_newton_step

__all__ = ["AdamSearch", "GaussNewtonSearch", "Losses", "Search", "SearchKind", "StepSettings"]

SearchKind = Literal["adam", "gauss_newton"]

RADIUS = 0.5  # of the largest ‖δ‖, for the first step of Gauss-Newton
# Share of the promised gain under which steps become shorter, and above which they become longer.
POOR, GOOD = 0.25, 0.75
SHORTER, LONGER = 1 / 3, 2.5


@dataclass(frozen=True)
class Losses:
    """Losses of requests at a pass, [E] each but for those of the rows.

    Args:
        total: Sum of the next three.
        nll: Negative log-likelihood of the target, with its factor.
        kl: Divergence at the anchor, with its factor.
        wd: Weight decay, with its factor.
        plain: Negative log-likelihood without its factor.
        right: Whether all tokens of the target are the likeliest, where that is asked for.
        rows: Negative log-likelihood in each template, [E, T].
    """

    total: Tensor
    nll: Tensor
    kl: Tensor
    wd: Tensor
    plain: Tensor
    right: Tensor
    rows: Tensor

    @property
    def likely(self) -> Tensor:
        """Mean probability of the target's tokens (geometric)."""
        return torch.exp(-self.plain)

    def table(self) -> Tensor:
        """What is reported of them, [E, 4]."""
        return torch.stack([self.total, self.nll, self.kl, self.wd], 1).detach()

    def weighed(self, factor: Tensor) -> Self:
        """The same with another factor of the likelihood, [E]."""
        nll = factor * self.plain
        return replace(self, nll=nll, total=nll + self.kl + self.wd)

    def select(self, kept: Tensor) -> Self:
        """Those of some requests, without a way back."""
        return type(self)(**{f.name: getattr(self, f.name).detach()[kept] for f in fields(self)})

    def merged(self, other: Self, own: Tensor) -> Self:
        """These where ``own``, [E], and others elsewhere, without a way back."""

        def pick(name: str) -> Tensor:
            mine, theirs = getattr(self, name).detach(), getattr(other, name).detach()
            return torch.where(own.reshape(-1, *[1] * (mine.ndim - 1)), mine, theirs)

        return type(self)(**{f.name: pick(f.name) for f in fields(self)})


@dataclass(frozen=True)
class StepSettings:
    """What a search has to know.

    Args:
        lr: Learning rate of Adam.
        clamp_norm_factor: ‖δ‖ is kept below this factor times ‖v‖.
        weight_decay: Factor of ‖δ‖ / ‖v‖².
    """

    lr: float
    clamp_norm_factor: float
    weight_decay: float


class Search(Protocol):
    """Many searches at once, each on its own."""

    @property
    def trial(self) -> Tensor:
        """δ of the next pass, [E, C, D]."""

    @property
    def found(self) -> Tensor:
        """The best δ known, [E, C, D]."""

    def look(self, losses: Losses, factor: Tensor, active: Tensor) -> Losses:
        """Losses at ``found``, once those of a pass at ``trial`` are known.

        Args:
            losses: Those of the pass.
            factor: Factor of the likelihood, [E].
            active: Requests that are still searched, [E].
        """

    def step(self, losses: Losses, delta: Tensor, change: Tensor, going: Tensor) -> None:
        """Moves ``trial`` of requests.

        Args:
            losses: Those of the pass, with the way back.
            delta: δ of the pass, [E, C, D].
            change: The same of each row, [N, C, D], on the way from δ to the losses.
            going: Which requests move, [E]; the others stand still.
        """

    def select(self, kept: Tensor) -> None:
        """Goes on with some of the requests, [e]."""


class AdamSearch:
    """Adam, as in the papers.

    Args:
        start: δ to start from, [E, C, D].
        norm: ‖v‖, [E, C].
        settings: Its learning rate and the bound on ‖δ‖.
    """

    def __init__(self, start: Tensor, norm: Tensor, settings: StepSettings) -> None:
        self.trial = start
        self.settings = settings
        self._first, self._second = torch.zeros_like(start), torch.zeros_like(start)
        self._limit = settings.clamp_norm_factor * norm[..., None]
        self._steps = 0  # every request that is not finished has made as many

    @property
    def found(self) -> Tensor:
        """The δ of the next pass: each step counts as better."""
        return self.trial

    def look(self, losses: Losses, factor: Tensor, active: Tensor) -> Losses:
        """The losses of the pass."""
        return losses

    def step(self, losses: Losses, delta: Tensor, change: Tensor, going: Tensor) -> None:
        """A step of Adam, back into the ball where it leads out."""
        searched = torch.where(going, losses.total, 0.0).sum()
        (gradient,) = torch.autograd.grad(searched, delta)
        with torch.no_grad():
            move, self._first, self._second = adam_step(
                gradient, self._first, self._second, self._steps, self.settings.lr
            )
            moved = clamp_norm(delta + move, self._limit)
            self.trial = torch.where(going[:, None, None], moved, delta).detach()
        self._steps += 1

    def select(self, kept: Tensor) -> None:
        """Goes on with some of the requests."""
        self.trial, self._limit = self.trial[kept], self._limit[kept]
        self._first, self._second = self._first[kept], self._second[kept]


class GaussNewtonSearch:
    """Steps to the minimum of a model of the loss, within a radius in which the model holds.

    A step that makes the loss larger is taken back and the radius shortened, so that what is found
    is the best of all passes.

    Args:
        start: δ to start from, [E, C, D].
        norm: ‖v‖, [E, C].
        settings: The bound on ‖δ‖ and the weight decay.
    """

    def __init__(self, start: Tensor, norm: Tensor, settings: StepSettings) -> None:
        self.trial = self.found = start
        self._norm = norm
        self._settings = settings
        self._radius = RADIUS * self._bound()
        self._promised = self._factor = self._radius
        self._best: Losses | None = None
        self._better = torch.ones_like(self._radius, dtype=torch.bool)
        # Slopes of the rows at what is found, [E, T + 1, C D].
        self._slopes: Tensor | None = None

    def look(self, losses: Losses, factor: Tensor, active: Tensor) -> Losses:
        """The losses of the best pass so far; the radius follows how the model did."""
        self._factor = factor
        if self._best is None:
            self._best = losses.merged(losses, self._better)
            return self._best
        best = self._best.weighed(factor)
        gain = best.total - losses.total.detach()
        self._better = active & (gain > 0)
        length = torch.linalg.vector_norm((self.trial - self.found).flatten(1), dim=-1)
        share = torch.nan_to_num(gain / self._promised.clamp_min(1e-12), nan=-1.0)
        is_long = (share > GOOD) & (length > 0.9 * self._radius)
        radius = torch.where(is_long, LONGER * self._radius, self._radius)
        self._radius = torch.where(share < POOR, SHORTER * length, radius)
        self._best = losses.merged(best, self._better)
        self.found = torch.where(self._better[:, None, None], self.trial, self.found)
        return self._best

    def step(self, losses: Losses, delta: Tensor, change: Tensor, going: Tensor) -> None:
        """A step from the best δ, by the slopes there."""
        searched = losses.rows.sum(1) + losses.kl
        (slopes,) = torch.autograd.grad(torch.where(going, searched, 0.0).sum(), change)
        count, best = len(going), self._best
        rows = slopes.reshape(count, -1, delta[0].numel())
        if self._slopes is not None:
            rows = torch.where(self._better[:, None, None], rows, self._slopes)
        self._slopes = rows
        if best is None:
            raise RuntimeError("`look` comes before `step`.")
        decay = (self._settings.weight_decay / self._norm.square()).mean(1)
        at, nll, kl = self.found.flatten(1), best.rows, best.kl
        terms = Terms(at, nll, rows[:, :-1], kl, rows[:, -1], self._factor, decay)
        move, promised = gauss_newton_step(terms, self._radius, self._bound())
        limit = self._settings.clamp_norm_factor * self._norm[..., None]
        moved = clamp_norm(self.found + move.reshape(self.found.shape), limit)
        self.trial = torch.where(going[:, None, None], moved, self.found)
        self._promised = promised

    def select(self, kept: Tensor) -> None:
        """Goes on with some of the requests."""
        self.trial, self.found = self.trial[kept], self.found[kept]
        self._norm, self._radius = self._norm[kept], self._radius[kept]
        self._factor = self._factor[kept]
        self._promised, self._better = self._promised[kept], self._better[kept]
        self._best = None if self._best is None else self._best.select(kept)
        self._slopes = None if self._slopes is None else self._slopes[kept]

    def _bound(self) -> Tensor:
        """Largest length of a request's δ, [E]."""
        limit = self._settings.clamp_norm_factor * self._norm
        bound: Tensor = torch.linalg.vector_norm(limit, dim=-1)
        return bound
