# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""RLEdit: a network that is trained on sequences of edits, each on top of those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from typing_extensions import override

from lightning_edit.core.locator import ModelTree, WeightSite
from lightning_edit.modules.arguments import check_arguments
from lightning_edit.modules.meta_learning.factors import Factors, Gradients, Positions
from lightning_edit.modules.meta_learning.hypernetwork import HyperEditModule, check_counts
from lightning_edit.modules.meta_learning.malmen_network import MALMENNetwork, MALMENSettings
from lightning_edit.modules.meta_learning.training_loss import SequenceLoss

__all__ = ["RLEdit"]


class RLEdit(HyperEditModule):
    """Learns to edit again and again: each edit is made of a model that the earlier ones changed.

    The network is [`MALMEN`][lightning_edit.MALMEN]'s: rows of answers go through a residual
    network of low rank, and the changes that they ask for are met by least squares. Editing is seen
    as a decision process, of which each edit is an action. A batch of the data is a sequence of n
    edits; after each, the reward is that answers are said and all else is left alone, for the
    latest requests and, discounted, for earlier ones:
    L = 1/n Σ_t (Σ_j γʲ (a · NLL(t − j) + b · KL(t − j)) + λ ‖ΔW_t‖²).

    The gradient of each edit goes through that edit alone, and KL is against the model before all
    edits, so that drift counts. The authors' code measures it against the model before the latest
    edit, takes no gradient of ‖ΔW‖², and steps once an epoch.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. The last three if None.
        rank: Largest rank of the network's maps.
        blocks: Layers of the network.
        lr: Learning rate of the network (Adam).
        edit_lr: Step size η at the beginning; it goes by the sizes of the model and of its
            activations.
        edit_lr_lr: Learning rate of η and of log λ of the least squares; that of the network if
            None.
        log_ridge: That log λ at the beginning.
        sequence: n, the edits that a batch of the data is divided into; one for each request where
            there are fewer. The authors take 400 of 20 requests each.
        discount: γ, how much each earlier edit counts for those after it.
        back_depth: How many edits' requests count, the latest included.
        shift_penalty: λ of the loss, the weight of ‖ΔW‖².
        micro_batch_size: Requests in a pass, which bounds memory and changes no edit.
        edit_weight: a, the weight of the loss of the new answers.
        locality_weight: b, that of the divergence on the locality probes.
        normalize: Normalize rows by running statistics, which go on in training.
        biased_variance: Let the statistics add variances as the authors' code does, which
            overstates them and depends on ``micro_batch_size``.
        kwargs: Further arguments of ``HyperEditModule``, such as ``modules`` and ``train_on``.

    References:
        Reinforced Lifelong Editing for Language Models, arXiv 2502.05759.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_edit import EditDataModule
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> editor = RLEdit.from_model(*trained_tiny_model(), rank=8, sequence=2)
        >>> quiet = dict(logger=False, enable_checkpointing=False, limit_val_batches=0,
        ...              enable_progress_bar=False, enable_model_summary=False)
        >>> data = EditDataModule(requests=tiny_requests(4), batch_size=4)
        >>> Trainer(max_epochs=1, **quiet).fit(editor, data)
        >>> editor.edit(tiny_requests(2)).details["requests"][0]["steps"]
        1
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2502.05759"
    unused_arguments: ClassVar[Mapping[str, str]] = {
        "edits_at_once": "`sequence` divides a batch into edits. Leave it out."
    }
    default_modules: ClassVar[tuple[str, ...]] = ("mlp_in",)
    positions: ClassVar[Positions] = "answers"
    locality_positions: ClassVar[Positions] = "answers"
    gradient_of: Literal["mean", "sum", "edit"] = "sum"

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        rank: int = 1024,
        blocks: int = 4,
        lr: float = 1e-5,
        edit_lr: float = 1e-6,
        edit_lr_lr: float | None = None,
        log_ridge: float = 0.0,
        sequence: int = 400,
        discount: float = 0.95,
        back_depth: int = 10,
        shift_penalty: float = 1e-4,
        micro_batch_size: int = 4,
        edit_weight: float = 1.0,
        locality_weight: float = 0.6,
        normalize: bool = True,
        biased_variance: bool = False,
        **kwargs: Any,
    ) -> None:
        check_arguments(type(self), kwargs, self.unused_arguments)
        super().__init__(
            model,
            layers,
            edits_at_once=kwargs.pop("edits_at_once", None),
            micro_batch_size=micro_batch_size,
            edit_weight=edit_weight,
            locality_weight=locality_weight,
            **kwargs,
        )
        check_counts(rank=rank, blocks=blocks, sequence=sequence, back_depth=back_depth)
        self.network_settings = MALMENSettings(
            rank, blocks, lr, edit_lr, edit_lr_lr, log_ridge, normalize, biased_variance
        )
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
