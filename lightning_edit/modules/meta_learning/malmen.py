# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""MALMEN: a network that edits with many facts at once, joined by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from typing_extensions import override

from lightning_edit.core.locator import ModelTree, WeightSite
from lightning_edit.modules.meta_learning.factors import Factors, Gradients, Positions
from lightning_edit.modules.meta_learning.hypernetwork import HyperEditModule, check_counts
from lightning_edit.modules.meta_learning.malmen_network import MALMENNetwork, MALMENSettings
from lightning_edit.modules.meta_learning.training_loss import SequenceLoss

__all__ = ["MALMEN"]


class MALMEN(HyperEditModule):
    """Learns to edit with hundreds of facts at once.

    At the places where answers are predicted, the inputs k of a matrix and the gradients g at its
    output go through a residual network of low rank. Each row asks for a change of the output at
    k, D = −η (k · k̃) g̃, and all of them are met in the sense of least squares:
    ΔWᵀ = (Kᵀ K + λ I)⁻¹ Kᵀ D, solved in float64 as Kᵀ (K Kᵀ + λ I)⁻¹ D. The gradient goes through
    the solution, so η and λ of each matrix are learned, too.

    Trained on NLL of the rephrases plus KL at the answers of unrelated questions, with all requests
    of a batch in one edit: train with about as many as you will edit with at most; fewer are
    edited by the same scale. All gradients are divided by the target tokens of the first edit in
    training, and by nothing without ``normalize``.

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
        micro_batch_size: Requests in a pass, which bounds memory and changes no edit.
        edit_weight: Weight of the loss of the new answers.
        normalize: Normalize rows by running statistics, which go on in training.
        biased_variance: Let the statistics add variances as the authors' code does, which
            overstates them and depends on ``micro_batch_size``.
        sequence: Edits that follow one another in training, each on top of those before it: a
            batch of the data is divided into so many. Above 1 it is trained as
            [`RLEdit`][lightning_edit.RLEdit] is.
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
    default_modules: ClassVar[tuple[str, ...]] = ("mlp_out",)
    positions: ClassVar[Positions] = "answers"
    locality_positions: ClassVar[Positions] = "answers"
    gradient_of: Literal["mean", "sum", "edit"] = "sum"

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
        check_counts(rank=rank, blocks=blocks, sequence=sequence, back_depth=back_depth)
        if sequence > 1 and edits_at_once is not None:
            raise ValueError(
                "`sequence` divides a batch into edits itself. Leave `edits_at_once` out."
            )
        self.network_settings = MALMENSettings(
            rank, blocks, lr, edit_lr, edit_lr_lr, log_ridge, normalize, biased_variance
        )
        if sequence > 1:
            self.training_loss = SequenceLoss(sequence, discount, back_depth, shift_penalty)

    @override
    def build(
        self, tree: ModelTree, sites: Sequence[WeightSite], generator: torch.Generator
    ) -> nn.Module:
        return MALMENNetwork(sites, self.network_settings, generator)

    @override
    def network_optimizer(self) -> Any:
        return self.network.optimizer()

    @override
    def transform(self, gradients: Gradients) -> dict[str, Factors]:
        found: dict[str, Factors] = self.network(gradients, self.micro_batch_size)
        return found
