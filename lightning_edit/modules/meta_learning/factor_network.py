# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The networks of MEND and MALMEN: from factors of a gradient to factors of an edit."""

# Shapes: N rows, F features (inputs I and outputs O of a projection together), R rank, M matrices
# of one shape.

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_edit.core.errors import EditError
from lightning_edit.core.locator import WeightSite
from lightning_edit.core.processes import Processes
from lightning_edit.functional.malmen import malmen_block
from lightning_edit.functional.mend import mend_block
from lightning_edit.functional.ultra_edit import (
    Normalizer,
    merge_normalizers,
    normalize,
    row_moments,
)

__all__ = ["FactorNetwork", "MALMENBlock", "MENDBlock", "members", "shape_key"]

CHUNK = 1024  # rows that go through a network at once


class MENDBlock(nn.Module):
    """A layer of MEND: U zeros, V normal, scale and shift of each matrix inside the ReLU.

    Args:
        features: F.
        rank: R.
        matrices: M.
        generator: Of the numbers V begins with.
    """

    def __init__(self, features: int, rank: int, matrices: int, generator: torch.Generator) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(features, rank))
        self.down = nn.Parameter(torch.randn(rank, features, generator=generator))
        self.bias = nn.Parameter(torch.zeros(features))
        self.scale = nn.Parameter(torch.ones(matrices, features))
        self.shift = nn.Parameter(torch.zeros(matrices, features))

    @override
    def forward(self, rows: Tensor, matrix: int) -> Tensor:
        scale, shift = self.scale[matrix], self.shift[matrix]
        return mend_block(rows, self.up, self.down, self.bias, scale, shift)


class MALMENBlock(nn.Module):
    """A layer of MALMEN: A normal, B zeros, scale and shift of each matrix after the ReLU.

    Args:
        features: F.
        rank: R.
        matrices: M.
        generator: Of the numbers A begins with.
    """

    def __init__(self, features: int, rank: int, matrices: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(features, rank, generator=generator))
        self.up = nn.Parameter(torch.zeros(rank, features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.scale = nn.Parameter(torch.ones(matrices, features))
        self.shift = nn.Parameter(torch.zeros(matrices, features))

    @override
    def forward(self, rows: Tensor, matrix: int) -> Tensor:
        scale, shift = self.scale[matrix], self.shift[matrix]
        return malmen_block(rows, self.down, self.up, self.bias, scale, shift)


class FactorNetwork(nn.Module):
    """The network of all edited matrices of one shape, with their running statistics.

    The statistics are buffers with an explicit count: they are saved, they go on after a reload,
    and a network that has seen nothing says so.

    Args:
        block: Kind of the layers.
        site: One of the matrices.
        matrices: Number of matrices that share the network.
        rank: Largest rank of a layer's map.
        blocks: Number of layers.
        generator: Of the numbers the layers begin with.
        eps: ε of the normalization; None to leave rows as they are.
        biased_variance: Let the statistics add variances as MALMEN's code does.
    """

    total: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(
        self,
        block: type[MENDBlock] | type[MALMENBlock],
        site: WeightSite,
        matrices: int,
        rank: int,
        blocks: int,
        generator: torch.Generator,
        eps: float | None,
        *,
        biased_variance: bool = False,
    ) -> None:
        super().__init__()
        self.inputs = site.in_features
        features = site.in_features + site.out_features
        self.eps = eps
        self.biased_variance = biased_variance
        self.blocks = nn.ModuleList(
            block(features, min(rank, features), matrices, generator) for _ in range(blocks)
        )
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(features, dtype=torch.float64))

    @property
    def is_ready(self) -> bool:
        """Whether rows can be normalized: a variance takes two rows."""
        return self.eps is None or int(self.total) >= 2

    @torch.no_grad()
    def learn(self, inputs: Tensor, gradients: Tensor, processes: Processes) -> None:
        """Has the statistics take in further rows; where there is none, they stay as they are.

        Args:
            inputs: [N, I].
            gradients: [N, O].
            processes: Those that take in rows of their own at the same time.

        Raises:
            EditError: If a process has a single row, and ``biased_variance`` its variance.
        """
        own = row_moments(torch.cat([inputs, gradients], 1))
        for part in processes.parts(torch.cat([own.total[None], own.mean, own.squares])):
            self._update(Normalizer(part[0], *part[1:].chunk(2)))

    def _update(self, moments: Normalizer) -> None:
        if not moments.total:
            return
        if self.biased_variance and int(moments.total) == 1:
            raise EditError(
                "A pass has a single row, which has no variance, as `biased_variance` would have "
                "it. Turn that off, or raise `micro_batch_size` or the number of requests."
            )
        merged = merge_normalizers(
            Normalizer(self.total, self.mean, self.squares),
            moments,
            biased_variance=self.biased_variance,
        )
        for name, tensor in merged._asdict().items():
            cast(Tensor, getattr(self, name)).copy_(tensor)

    @override
    def forward(self, inputs: Tensor, gradients: Tensor, matrix: int) -> tuple[Tensor, Tensor]:
        """Transforms rows of factors.

        Args:
            inputs: [N, I].
            gradients: [N, O].
            matrix: Which of the matrices of this shape they are of.

        Returns:
            [N, I] and [N, O].
        """
        rows = torch.cat([inputs, gradients], 1)
        if self.eps is not None:
            rows = normalize(rows, Normalizer(self.total, self.mean, self.squares), self.eps)
        parts = [self._transformed(part, matrix) for part in torch.split(rows, CHUNK)]
        rows = torch.cat(parts) if len(parts) > 1 else parts[0]
        return rows[:, : self.inputs], rows[:, self.inputs :]

    def _transformed(self, rows: Tensor, matrix: int) -> Tensor:
        if len(rows) == CHUNK:  # one of many: what lies between is computed again on the way back
            found: Tensor = checkpoint(self._through, rows, matrix, use_reentrant=False)
            return found
        return self._through(rows, matrix)

    def _through(self, rows: Tensor, matrix: int) -> Tensor:
        for block in self.blocks:
            rows = block(rows, matrix)
        return rows


def shape_key(site: WeightSite) -> str:
    """Name of the group of matrices of a site's shape."""
    return f"{site.out_features}x{site.in_features}"


def members(sites: Sequence[WeightSite]) -> dict[str, list[WeightSite]]:
    """The matrices of each shape, in order.

    Args:
        sites: All edited matrices.
    """
    found: dict[str, list[WeightSite]] = {}
    for site in sites:
        found.setdefault(shape_key(site), []).append(site)
    return found
