# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""LoRA as an editor: a fresh low-rank adapter for each batch of requests."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.optim import Adam
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.locator import ModelTree
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.fine_tuning.adapter_layers import AdapterLayers, adapter_sites
from lightning_edit.passes.target_loss import row_means, target_nll

__all__ = ["LoRA"]


class LoRA(EditModule):
    """Low-rank adaptation as an editor: ΔW = (alpha/r) B A on query and value projections.

    Adam trains a fresh adapter of peft on the targets of a batch of requests, from the weights as
    they stand. The edit is its exact low-rank change, so an edited model costs nothing to run, and
    the edit can be exported as a LoRA adapter without loss.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. All of them if None; of an
            encoder-decoder those of both stacks if None, and of the decoder otherwise.
        target_modules: Last parts of names of linear maps to adapt, such as ``[q_proj, up_proj]``.
            The query and value projections of self-attention, or what they are fused in, if None.
        rank: Rank r of the change of each weight.
        alpha: The change is scaled by alpha / r.
        steps: Steps of Adam, at most.
        lr: Learning rate of Adam.
        stop_loss: Mean loss in nats below which training stops. The papers' editors make all
            steps, most of them after the loss has vanished; 0 does the same.
        seed: Seed of A; B begins at zero.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].

    Raises:
        MissingDependencyError: From ``edit``, if peft is not installed.

    References:
        LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; as an editor in
        EasyEdit, arXiv 2308.07269.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        target_modules: list[str] | None = None,
        rank: int = 8,
        alpha: float = 32.0,
        steps: int = 70,
        lr: float = 5e-3,
        stop_loss: float = 1e-2,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        for name, value in (("rank", rank), ("steps", steps)):
            if value < 1:
                raise ValueError(f"`{name}` is expected to be at least 1, but got {value}.")
        self.target_modules = target_modules
        self.rank = rank
        self.alpha = alpha
        self.steps = steps
        self.lr = lr
        self.stop_loss = stop_loss
        self.seed = seed

    @override
    def edited_names(self, tree: ModelTree) -> list[str]:
        return [s.name for s in adapter_sites(tree.model, self.layers, self.target_modules)]

    def initial_adapter(self) -> AdapterLayers:
        """The adapter that is trained, as it begins: A of each weight from the seed, B zero."""
        sites = adapter_sites(self.model, self.layers, self.target_modules)
        return AdapterLayers(self.model, sites, rank=self.rank, alpha=self.alpha, seed=self.seed)

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        tree = self.tree
        adapter = self.initial_adapter()
        factors = adapter.parameters
        adam = Adam(factors, lr=self.lr)
        losses: list[list[float]] = []
        steps = 0
        with adapter.attached():
            for _ in range(self.steps):
                nll = target_nll(tree, batch)
                losses.append(row_means(nll.detach(), batch.labels).tolist())
                loss = nll.mean()
                if float(loss.detach()) < self.stop_loss:
                    break
                for factor, gradient in zip(
                    factors, torch.autograd.grad(loss, factors), strict=True
                ):
                    factor.grad = gradient
                adam.step()
                steps += 1
        edit = WeightDelta(adapter.changes() if steps else {})
        norm = edit.norm()
        edit.details = {
            "losses": [list(seen) for seen in zip(*losses, strict=True)],
            "requests": [
                {
                    "id": request.id,
                    "searched_loss": losses[-1][e],
                    "steps": steps,
                    "norm": norm,
                }
                for e, request in enumerate(batch.requests)
            ],
        }
        return edit
