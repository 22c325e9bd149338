# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""MEND: a network that turns the gradient of an edit into the edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Adam, Optimizer
from typing_extensions import override

from lightning_edit.core.locator import ModelTree, WeightSite
from lightning_edit.functional.mend import mend_factors
from lightning_edit.modules.meta_learning.factor_network import (
    FactorNetwork,
    MENDBlock,
    members,
    shape_key,
)
from lightning_edit.modules.meta_learning.factors import Factors, Gradients, grouped
from lightning_edit.modules.meta_learning.hypernetwork import HyperEditModule, check_counts

__all__ = ["MEND"]

EPS = 1e-7


class MENDNetwork(nn.Module):
    """Networks by shape, and a learned step size of each matrix.

    Args:
        networks: Networks by ``OxI``.
        count: Number of matrices.
        edit_lr: Step size at the beginning.
    """

    def __init__(self, networks: Mapping[str, FactorNetwork], count: int, edit_lr: float) -> None:
        super().__init__()
        self.by_shape = nn.ModuleDict(networks)
        self.edit_lr = nn.Parameter(torch.full((count,), edit_lr))


class MEND(HyperEditModule):
    """Learns to turn the gradient of an edit's loss into a good edit.

    The gradient of a matrix for one request is Σ d uᵀ, with an input u and a gradient d at the
    output for each token. A residual network of low rank, shared by the matrices of one shape,
    maps normalized u and d to ũ and d̃; the edit is −α Σ d̃ ũᵀ, with a learned α for each matrix.
    It begins as a normalized gradient step.

    Trained on 0.1 NLL of the rephrases plus KL on unrelated texts. Edits have the rank of their
    tokens. Several requests make one edit by adding up, each as it is by itself; the network is
    trained for that with ``edits_at_once``.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. The last three if None.
        rank: Largest rank of the network's maps.
        blocks: Layers of the network.
        lr: Learning rate of the network (Adam).
        edit_lr: α at the beginning.
        edit_lr_lr: Learning rate of α.
        normalize: Normalize factors by running statistics, which go on in training.
        descent: Subtract the edit, as in the paper; the authors' code adds it.
        average: Take the gradient of the mean loss of all tokens of an edit, as the authors' code
            does, so that each of n requests is written at about 1/n.
        kwargs: Further arguments of ``HyperEditModule``, such as ``modules`` and ``train_on``.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_edit import EditDataModule
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> editor = MEND.from_model(*trained_tiny_model(), rank=8)
        >>> quiet = dict(logger=False, enable_checkpointing=False, limit_val_batches=0,
        ...              enable_progress_bar=False, enable_model_summary=False)
        >>> Trainer(max_epochs=2, **quiet).fit(editor, EditDataModule(requests=tiny_requests(4)))
        >>> editor.edit(tiny_requests(1)).details["requests"][0]["steps"]
        1

    References:
        Fast Model Editing at Scale, arXiv 2110.11309.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2110.11309"

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        rank: int = 1920,
        blocks: int = 2,
        lr: float = 1e-6,
        edit_lr: float = 1e-4,
        edit_lr_lr: float = 1e-4,
        normalize: bool = True,
        descent: bool = True,
        average: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        check_counts(rank=rank, blocks=blocks)
        self.rank = rank
        self.blocks = blocks
        self.lr = lr
        self.edit_lr = edit_lr
        self.edit_lr_lr = edit_lr_lr
        self.normalize = normalize
        self.descent = descent
        if average:
            self.gradient_of = "edit"

    @override
    def build(
        self, tree: ModelTree, sites: Sequence[WeightSite], generator: torch.Generator
    ) -> nn.Module:
        networks = {
            key: FactorNetwork(
                MENDBlock,
                alike[0],
                len(alike),
                self.rank,
                self.blocks,
                generator,
                EPS if self.normalize else None,
            )
            for key, alike in members(sites).items()
        }
        return MENDNetwork(networks, len(sites), self.edit_lr)

    @override
    def network_optimizer(self) -> Optimizer:
        return Adam(
            [
                {"params": list(self.network.by_shape.parameters()), "lr": self.lr},
                {"params": [self.network.edit_lr], "lr": self.edit_lr_lr},
            ]
        )

    @override
    def transform(self, gradients: Gradients) -> dict[str, Factors]:
        groups, processes = gradients.groups, gradients.processes
        found: dict[str, Factors] = {}
        places: dict[str, int] = {}
        for site, edit_lr in zip(self.sites, self.network.edit_lr, strict=True):
            own, key = gradients.rows[site.name], shape_key(site)
            network, matrix = self.network.by_shape[key], places.setdefault(key, 0)
            places[key] += 1
            if processes is not None:
                network.learn(own.inputs, own.gradients, processes)
            pseudo_inputs, pseudo_gradients = network(own.inputs, own.gradients, matrix)
            u, v = mend_factors(pseudo_inputs, pseudo_gradients, edit_lr, descent=self.descent)
            found[site.name] = grouped(u, v, groups[own.requests], gradients.count)
        return found
