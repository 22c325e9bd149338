# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""MALMEN: a network that edits with many facts at once, joined by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Adam
from typing_extensions import override

from lightning_edit.core.batch import IGNORE_INDEX, EditBatch
from lightning_edit.core.errors import EditError
from lightning_edit.core.locator import WeightSite
from lightning_edit.core.request import EditRequest
from lightning_edit.functional.malmen import value_differences
from lightning_edit.functional.ultra_edit import ridge_factors, row_moments
from lightning_edit.modules.meta_learning.factor_network import (
    FactorNetwork,
    MALMENBlock,
    members,
    shape_key,
)
from lightning_edit.modules.meta_learning.factors import (
    FactorRows,
    Factors,
    Positions,
    grouped,
    stacked,
)
from lightning_edit.modules.meta_learning.hypernetwork import HyperEditModule
from lightning_edit.modules.meta_learning.judging import Part
from lightning_edit.modules.meta_learning.lessons import shared_weights
from lightning_edit.modules.meta_learning.replicas import Replicas

__all__ = ["MALMEN"]

EPS = torch.finfo(torch.float32).eps


class MALMENNetwork(nn.Module):
    """Networks by shape, and of each matrix a learned step size and log ridge.

    Args:
        networks: Networks by ``OxI``.
        count: Number of matrices.
        edit_lr: Step size at the beginning.
        log_ridge: Logarithm of the ridge at the beginning.
    """

    def __init__(
        self, networks: Mapping[str, FactorNetwork], count: int, edit_lr: float, log_ridge: float
    ) -> None:
        super().__init__()
        self.by_shape = nn.ModuleDict(networks)
        self.edit_lr = nn.Parameter(torch.full((count,), edit_lr))
        self.log_ridge = nn.Parameter(torch.full((count,), log_ridge))


class MALMEN(HyperEditModule):
    """Learns to edit with hundreds of facts at once.

    At the places where answers are predicted, the inputs k of a matrix and the gradients g at its
    output go through a residual network of low rank. Each row asks for a change of the output at
    k, D = −η (k · k̃) g̃, and all of them are met in the sense of least squares:
    ΔWᵀ = (Kᵀ K + λ I)⁻¹ Kᵀ D, solved in float64 as Kᵀ (K Kᵀ + λ I)⁻¹ D. The gradient goes through
    the solution, so η and λ of each matrix are learned, too.

    Trained on NLL of the rephrases plus KL at the answers of unrelated questions, with all requests
    of a batch in one edit: train with about as many as you will edit with.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. The last three if None.
        rank: Largest rank of the network's maps.
        blocks: Layers of the network.
        lr: Learning rate of the network (Adam).
        edit_lr: η at the beginning; it goes by the sizes of the model and of its activations.
        edit_lr_lr: Learning rate of η and of log λ; that of the network if None.
        log_ridge: log λ at the beginning.
        edits_at_once: Requests that one edit answers in training; all of a batch if None.
        micro_batch_size: Requests in a pass. A gradient is of the mean loss of its pass.
        edit_weight: Weight of the loss of the new answers.
        normalize: Normalize rows by running statistics, which go on in training.
        biased_variance: Let the statistics add variances as the authors' code does, which
            overstates them and depends on ``micro_batch_size``.
        sequence: Edits that follow one another in training, each on top of those before it: a
            batch of the data is divided into so many. Above 1 it is RLEdit.
        discount: How much an earlier edit of the sequence counts at each later one, for each edit
            in between.
        back_depth: Edits of the sequence, the latest first, that count at each.
        shift_penalty: Weight of ‖ΔW‖² of each edit of a sequence.
        kwargs: Further arguments of ``HyperEditModule``, such as ``modules`` and ``train_on``.

    References:
        Reinforced Lifelong Editing for Language Models, arXiv 2502.05759 (sequences).
        Massive Editing for Large Language Models via Meta Learning, arXiv 2311.04661.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2311.04661"
    positions: Positions = "answers"
    locality_positions: Positions = "answers"

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        rank: int = 1920,
        blocks: int = 2,
        lr: float = 1e-5,
        edit_lr: float = 1e-6,
        edit_lr_lr: float | None = None,
        log_ridge: float = 0.0,
        edits_at_once: int | None = None,
        micro_batch_size: int = 32,
        edit_weight: float = 1.0,
        normalize: bool = True,
        biased_variance: bool = False,
        sequence: int = 1,
        discount: float = 0.95,
        back_depth: int = 10,
        shift_penalty: float = 1e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            layers,
            edits_at_once=edits_at_once,
            micro_batch_size=micro_batch_size,
            edit_weight=edit_weight,
            **kwargs,
        )
        for name, number in (
            ("rank", rank),
            ("blocks", blocks),
            ("sequence", sequence),
            ("back_depth", back_depth),
        ):
            if number < 1:
                raise ValueError(f"`{name}` is expected to be at least 1, but got {number}.")
        self.rank = rank
        self.blocks = blocks
        self.lr = lr
        self.edit_lr = edit_lr
        self.edit_lr_lr = edit_lr_lr
        self.log_ridge = log_ridge
        self.normalize = normalize
        self.biased_variance = biased_variance
        self.sequence = sequence
        self.discount = discount
        self.back_depth = back_depth
        self.shift_penalty = shift_penalty
        if sequence > 1 and edits_at_once is not None:
            raise ValueError(
                "`sequence` divides a batch into edits itself. Leave `edits_at_once` out."
            )

    @override
    def default_projections(self) -> list[str]:
        return ["mlp_out"]

    @override
    def build(self, sites: Sequence[WeightSite], generator: torch.Generator) -> nn.Module:
        networks = {
            key: FactorNetwork(
                MALMENBlock,
                alike[0],
                len(alike),
                self.rank,
                self.blocks,
                generator,
                EPS if self.normalize else None,
                biased_variance=self.biased_variance,
            )
            for key, alike in members(sites).items()
        }
        return MALMENNetwork(networks, len(sites), self.edit_lr, self.log_ridge)

    @override
    def configure_optimizers(self) -> Any:
        rate = self.lr if self.edit_lr_lr is None else self.edit_lr_lr
        steps = [self.network.edit_lr, self.network.log_ridge]
        return Adam(
            [
                {"params": list(self.network.by_shape.parameters()), "lr": self.lr},
                {"params": steps, "lr": rate},
            ]
        )

    @override
    def inner_weights(self, batch: EditBatch, groups: Tensor) -> Tensor:
        passes = torch.arange(len(batch), device=groups.device) // self.micro_batch_size
        return shared_weights(batch.labels != IGNORE_INDEX, passes)

    @override
    def transform(
        self,
        rows: Mapping[str, FactorRows],
        requests: Sequence[EditRequest],
        groups: Tensor,
        count: int,
        replicas: Replicas | None,
    ) -> dict[str, Factors]:
        if replicas is not None:
            self._learn_statistics(rows, len(requests), replicas)
        found: dict[str, Factors] = {}
        places: dict[str, int] = {}
        network = self.network
        for site, edit_lr, log_ridge in zip(
            self.sites, network.edit_lr, network.log_ridge, strict=True
        ):
            own, key = rows[site.name], shape_key(site)
            matrix = places.setdefault(key, 0)
            places[key] += 1
            keys, gradients = network.by_shape[key](own.inputs, own.gradients, matrix)
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

    @override
    def lesson_loss(
        self, requests: Sequence[EditRequest], replicas: Replicas | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        if self.sequence == 1 or replicas is None:
            return super().lesson_loss(requests, replicas)
        size = -(-len(requests) // self.sequence)
        parts: list[Part] = []
        carried: dict[str, Factors] | None = None
        loss = torch.zeros((), device=self.network.edit_lr.device)
        figures = dict.fromkeys(("loss", "edit", "kl"), 0.0)
        for start in range(0, len(requests), size):
            parts.append(self._part(requests[start : start + size], replicas))
            factors = self._edits(parts[-1], replicas, carried)
            if factors is None:
                return self._nothing(), {}
            for age, part in enumerate(reversed(parts[-self.back_depth :])):
                found = self._verdict(part, factors, replicas, carried)
                if found is None:
                    return self._nothing(), {}
                share = self.discount**age / -(-len(requests) // size)
                loss = loss + share * self._pull(factors, found.gradients, replicas)
                edit, kl = float(found.edit), float(found.kl)
                figures["loss"] += share * (self.edit_weight * edit + self.locality_weight * kl)
                if not age:  # what is shown is how the edits are right after they are made
                    figures["edit"] += share * edit
                    figures["kl"] += share * kl
            squares = [((f.u @ f.u.mT) * (f.v @ f.v.mT)).sum() for f in factors.values()]
            penalty = self.shift_penalty * torch.stack(squares).sum()
            loss = loss + penalty
            figures["loss"] += float(penalty.detach())
            carried = {
                name: f if carried is None else stacked(carried[name], f)
                for name, f in ((n, Factors(f.u.detach(), f.v)) for n, f in factors.items())
            }
        return loss - loss.detach() + figures["loss"], figures

    def _learn_statistics(
        self, rows: Mapping[str, FactorRows], requests: int, replicas: Replicas
    ) -> None:
        for start in range(0, requests, self.micro_batch_size):
            for site in self.sites:
                own = rows[site.name]
                part = (own.requests >= start) & (own.requests < start + self.micro_batch_size)
                moments = row_moments(torch.cat([own.inputs[part], own.gradients[part]], 1))
                shares = [moments] if self.edits_at_once is None else replicas.moments(moments)
                for share in shares:
                    if self.biased_variance and int(share.total) == 1:
                        raise EditError(
                            "A pass has a single row, which has no variance, as `biased_variance` "
                            "would have it. Turn that off, or raise `micro_batch_size` or the "
                            "number of requests."
                        )
                    self.network.by_shape[shape_key(site)].update(share)
