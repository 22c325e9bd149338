# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of a LoRA adapter, whose change is merged into the weights at the end."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.locator import ModelTree
from lightning_edit.modules.fine_tuning.adapter_layers import AdapterLayers, adapter_sites
from lightning_edit.modules.fine_tuning.adapter_target import AdapterTarget
from lightning_edit.modules.fine_tuning.tuning import TuningModule
from lightning_edit.modules.targets import Target

__all__ = ["LoRATuning"]


class LoRATuning(TuningModule):
    """Fine-tunes a LoRA adapter of peft, by Lightning's own loop, on the targets of all edits.

    The adapter's layers are in the model during ``fit`` only. After it the model is a plain one
    again, with (alpha/r) B A added to its weights, and the edit holds the exact low-rank factors.
    Checkpoints hold nothing but the adapter, and weights beneath it if a callback changed them. A
    further ``fit`` goes on with the same adapter.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to adapt; negative ones count from the end. All of them if None; of an
            encoder-decoder those of both stacks if None, and of the decoder otherwise.
        target_modules: Last parts of names of linear maps to adapt, such as ``[q_proj, up_proj]``.
            The query and value projections of self-attention, or what they are fused in, if None.
        rank: Rank r of the change of each weight.
        alpha: The change is scaled by alpha / r.
        seed: Seed of A; B begins at zero.
        lr: Learning rate of Adam.
        kwargs: Further arguments of ``TuningModule``.

    Raises:
        MissingDependencyError: From ``fit`` and ``edit``, if peft is not installed.

    Examples:
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> model, tokenizer = trained_tiny_model()
        >>> editor = LoRATuning.from_model(model, tokenizer, layers=[2], lr=3e-2)
        >>> editor.edit(tiny_requests(1))
        WeightDelta(model.layers.2.self_attn.q_proj.weight: rank 8,
            model.layers.2.self_attn.v_proj.weight: rank 8)

    References:
        LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.
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
        seed: int = 0,
        lr: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, lr=lr, **kwargs)
        if rank < 1:
            raise ValueError(f"`rank` is expected to be at least 1, but got {rank}.")
        self.target_modules = target_modules
        self.rank = rank
        self.alpha = alpha
        self.seed = seed

    @override
    def edited_names(self, tree: ModelTree) -> list[str]:
        return [s.name for s in adapter_sites(tree.model, self.layers, self.target_modules)]

    @override
    def make_target(self, tree: ModelTree) -> Target[WeightDelta]:
        return AdapterTarget(
            tree.model,
            self.edited_names(tree),
            self.loop.request_ids,
            self._fresh_adapter,
            lambda: self.base,  # its hash is of the plain model
        )

    @property
    def adapter(self) -> AdapterLayers:
        """The adapter that ``fit`` trains, made at the first use."""
        return self._adapted.adapter

    @property
    def _adapted(self) -> AdapterTarget:
        target = self.target
        assert isinstance(target, AdapterTarget)  # noqa: S101 (what `make_target` returns)
        return target

    def _fresh_adapter(self) -> AdapterLayers:
        sites = adapter_sites(self.model, self.layers, self.target_modules)
        return AdapterLayers(self.model, sites, rank=self.rank, alpha=self.alpha, seed=self.seed)

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        batch = self.loss.ended(batch)
        with self._adapted.plain():
            adapter = self._fresh_adapter()
            factors = adapter.parameters
            optimizer = self.choice.make(factors)
            loss = torch.zeros(())
            with adapter.attached():
                for _ in range(self.steps):
                    loss = self.batch_loss(batch)
                    gradients = torch.autograd.grad(loss, factors)
                    for factor, gradient in zip(factors, gradients, strict=True):
                        factor.grad = gradient
                    optimizer.step()
                edit = WeightDelta(adapter.changes())
                return self.described(edit, batch, float(loss.detach()))
