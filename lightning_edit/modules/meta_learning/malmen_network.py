# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The network of MALMEN and RLEdit: from gradients to one least-squares solution an edit."""

# Shapes: N rows, I inputs and O outputs of a projection, G edits, n rows of an edit.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Adam
from typing_extensions import override

from lightning_edit.core.locator import WeightSite
from lightning_edit.core.processes import Processes
from lightning_edit.functional.malmen import value_differences
from lightning_edit.functional.ultra_edit import ridge_factors
from lightning_edit.modules.meta_learning.factor_network import (
    FactorNetwork,
    MALMENBlock,
    members,
    shape_key,
)
from lightning_edit.modules.meta_learning.factors import FactorRows, Factors, grouped

__all__ = ["MALMENNetwork"]

EPS = torch.finfo(torch.float32).eps


class MALMENNetwork(nn.Module):
    """Networks by shape, and of each matrix a learned step size and log ridge.

    Args:
        sites: The matrices.
        rank: Largest rank of the networks' maps.
        blocks: Layers of the networks.
        edit_lr: Step size η at the beginning.
        log_ridge: Logarithm of the ridge λ at the beginning.
        generator: Of the numbers that the networks begin with.
        normalize: Normalize rows by running statistics.
        biased_variance: Let the statistics add variances as the authors' code does.
    """

    def __init__(
        self,
        sites: Sequence[WeightSite],
        rank: int,
        blocks: int,
        edit_lr: float,
        log_ridge: float,
        generator: torch.Generator,
        *,
        normalize: bool,
        biased_variance: bool,
    ) -> None:
        super().__init__()
        self.sites = list(sites)
        self.by_shape = nn.ModuleDict(
            {
                key: FactorNetwork(
                    MALMENBlock,
                    alike[0],
                    len(alike),
                    rank,
                    blocks,
                    generator,
                    EPS if normalize else None,
                    biased_variance=biased_variance,
                )
                for key, alike in members(sites).items()
            }
        )
        self.edit_lr = nn.Parameter(torch.full((len(sites),), edit_lr))
        self.log_ridge = nn.Parameter(torch.full((len(sites),), log_ridge))

    def optimizer(self, lr: float, edit_lr_lr: float | None) -> Adam:
        """Adam for the networks, and for η and log λ.

        Args:
            lr: Learning rate of the networks.
            edit_lr_lr: That of η and log λ; the same if None.
        """
        rate = lr if edit_lr_lr is None else edit_lr_lr
        return Adam(
            [
                {"params": list(self.by_shape.parameters()), "lr": lr},
                {"params": [self.edit_lr, self.log_ridge], "lr": rate},
            ]
        )

    def learn(
        self, rows: Mapping[str, FactorRows], requests: int, size: int, processes: Processes
    ) -> None:
        """Has the statistics take in further rows, pass by pass.

        Args:
            rows: Factors by the parameter's name.
            requests: Number of requests that they are of.
            size: Requests in a pass.
            processes: Those that take in rows of their own at the same time.

        Raises:
            EditError: If a pass has a single row, and ``biased_variance`` its variance.
        """
        for start in range(0, requests, size):
            for site in self.sites:
                own = rows[site.name]
                part = (own.requests >= start) & (own.requests < start + size)
                network = cast(FactorNetwork, self.by_shape[shape_key(site)])
                network.learn(own.inputs[part], own.gradients[part], processes)

    @override
    def forward(
        self, rows: Mapping[str, FactorRows], groups: Tensor, count: int
    ) -> dict[str, Factors]:
        """Edits: ΔWᵀ = Kᵀ (K Kᵀ + λ I)⁻¹ D of the rows of each, D = −η (k · k̃) g̃.

        Args:
            rows: Factors by the parameter's name: inputs k [N, I] and gradients g [N, O].
            groups: The edit that each request belongs to, [requests] int64.
            count: G, the number of edits.

        Returns:
            Factors [G, n, O] and [G, n, I] by the parameter's name.
        """
        found: dict[str, Factors] = {}
        places: dict[str, int] = {}
        for site, edit_lr, log_ridge in zip(self.sites, self.edit_lr, self.log_ridge, strict=True):
            own, key = rows[site.name], shape_key(site)
            matrix = places.setdefault(key, 0)
            places[key] += 1
            keys, gradients = self.by_shape[key](own.inputs, own.gradients, matrix)
            values = value_differences(own.inputs, keys, gradients, edit_lr)
            owners = groups[own.requests]
            parts = [owners == group for group in torch.unique(owners)]
            solved = [
                ridge_factors(own.inputs[part], values[part], log_ridge.double().exp())
                for part in parts
            ]
            order = torch.cat([torch.nonzero(part)[:, 0] for part in parts] or [owners])
            u = torch.cat([u.T for u, _ in solved] or [own.gradients])
            found[site.name] = grouped(u, own.inputs[order], owners[order], count)
        return found
