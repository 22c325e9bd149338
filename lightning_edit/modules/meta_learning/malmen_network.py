# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The network of MALMEN and RLEdit: from gradients to one least-squares solution an edit."""

# Shapes: N rows, I inputs and O outputs of a projection, G edits, n rows of an edit.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Adam
from typing_extensions import override

from lightning_edit.core.locator import WeightSite
from lightning_edit.functional.malmen import value_differences
from lightning_edit.functional.ultra_edit import ridge_factors
from lightning_edit.modules.meta_learning.factor_network import (
    FactorNetwork,
    MALMENBlock,
    members,
    shape_key,
)
from lightning_edit.modules.meta_learning.factors import Factors, Gradients, grouped

__all__ = ["MALMENNetwork", "MALMENSettings"]

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class MALMENSettings:
    """How a ``MALMENNetwork`` is built and learns.

    Args:
        rank: Largest rank of the networks' maps.
        blocks: Layers of the networks.
        lr: Learning rate of the networks (Adam).
        edit_lr: Step size η at the beginning.
        edit_lr_lr: Learning rate of η and log λ; that of the networks if None.
        log_ridge: Logarithm of the ridge λ at the beginning.
        normalize: Normalize rows by running statistics.
        biased_variance: Let the statistics add variances as the authors' code does.
    """

    rank: int
    blocks: int
    lr: float
    edit_lr: float
    edit_lr_lr: float | None
    log_ridge: float
    normalize: bool
    biased_variance: bool


class MALMENNetwork(nn.Module):
    """Networks by shape, and of each matrix a learned step size and log ridge.

    Gradients are those of the sum of a request's losses, over one divisor for all of them: the
    number of target tokens of the first edit in training, or 1 where rows are not normalized. So
    they have the size of a mean loss, as in the authors' code, but a request's gradient does
    not depend on those beside it.

    Args:
        sites: The matrices.
        settings: How it is built and learns.
        generator: Of the numbers that the networks begin with.
    """

    divisor: Tensor

    def __init__(
        self,
        sites: Sequence[WeightSite],
        settings: MALMENSettings,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.sites = list(sites)
        self.settings = settings
        self.by_shape = nn.ModuleDict(
            {
                key: FactorNetwork(
                    MALMENBlock,
                    alike[0],
                    len(alike),
                    settings.rank,
                    settings.blocks,
                    generator,
                    EPS if settings.normalize else None,
                    biased_variance=settings.biased_variance,
                )
                for key, alike in members(sites).items()
            }
        )
        self.edit_lr = nn.Parameter(torch.full((len(sites),), settings.edit_lr))
        self.log_ridge = nn.Parameter(torch.full((len(sites),), settings.log_ridge))
        # 0 until it is known.
        self.register_buffer("divisor", torch.tensor(0.0 if settings.normalize else 1.0))

    def optimizer(self) -> Adam:
        """Adam for the networks, and for η and log λ."""
        settings = self.settings
        rate = settings.lr if settings.edit_lr_lr is None else settings.edit_lr_lr
        return Adam(
            [
                {"params": list(self.by_shape.parameters()), "lr": settings.lr},
                {"params": [self.edit_lr, self.log_ridge], "lr": rate},
            ]
        )

    @override
    def forward(self, gradients: Gradients, size: int) -> dict[str, Factors]:
        """Edits: ΔWᵀ = Kᵀ (K Kᵀ + λ I)⁻¹ D of the rows of each, D = −η (k · k̃) g̃.

        In training, statistics take in the rows first.

        Args:
            gradients: Inputs k [N, I] and gradients g [N, O] of the sum of each request's losses.
            size: Requests in a pass, a variance of each of which ``biased_variance`` takes.

        Returns:
            Factors [G, n, O] and [G, n, I] by the parameter's name.

        Raises:
            EditError: If a pass has a single row, and ``biased_variance`` its variance.
        """
        divisor = self._divisor(gradients)
        rows = {name: own.divided(divisor) for name, own in gradients.rows.items()}
        if gradients.processes is not None:
            for start in range(0, len(gradients.requests), size):
                for site in self.sites:
                    own = rows[site.name]
                    part = (own.requests >= start) & (own.requests < start + size)
                    network = cast(FactorNetwork, self.by_shape[shape_key(site)])
                    network.learn(own.inputs[part], own.gradients[part], gradients.processes)
        found: dict[str, Factors] = {}
        places: dict[str, int] = {}
        for site, edit_lr, log_ridge in zip(self.sites, self.edit_lr, self.log_ridge, strict=True):
            own, key = rows[site.name], shape_key(site)
            matrix = places.setdefault(key, 0)
            places[key] += 1
            pseudo_keys, pseudo_gradients = self.by_shape[key](own.inputs, own.gradients, matrix)
            values = value_differences(own.inputs, pseudo_keys, pseudo_gradients, edit_lr)
            owners = gradients.groups[own.requests]
            parts = [owners == group for group in torch.unique(owners)]
            solved = [
                ridge_factors(own.inputs[part], values[part], log_ridge.double().exp())
                for part in parts
            ]
            order = torch.cat([torch.nonzero(part)[:, 0] for part in parts] or [owners])
            u = torch.cat([u.T for u, _ in solved] or [own.gradients])
            found[site.name] = grouped(u, own.inputs[order], owners[order], gradients.count)
        return found

    def _divisor(self, gradients: Gradients) -> float:
        """What gradients are divided by; set once, in training."""
        if self.divisor:
            return float(self.divisor)
        tokens = gradients.tokens / gradients.count
        if gradients.processes is not None:
            self.divisor.fill_(tokens)
        return tokens
