# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of a LoRA adapter, whose change is merged into the weights at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.locator import ModelTree
from lightning_edit.modules.fine_tuning.adapter_layers import AdapterLayers, adapter_sites
from lightning_edit.modules.fine_tuning.tuning import TuningModule

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

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        target_modules: list[str] | None = None,
        rank: int = 8,
        alpha: float = 16.0,
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
        self._adapter: AdapterLayers | None = None
        # The weights beneath the adapter while it is merged into them.
        self._beneath: dict[str, Tensor] = {}

    @override
    def edited_names(self, tree: ModelTree) -> list[str]:
        return [s.name for s in adapter_sites(tree.model, self.layers, self.target_modules)]

    # -- the adapter in the model --------------------------------------------------------------

    @property
    def adapter(self) -> AdapterLayers:
        """The adapter that ``fit`` trains, made at the first use."""
        if self._adapter is None:
            self._adapter = self._fresh_adapter()
        return self._adapter

    def _fresh_adapter(self) -> AdapterLayers:
        sites = adapter_sites(self.model, self.layers, self.target_modules)
        return AdapterLayers(self.model, sites, rank=self.rank, alpha=self.alpha, seed=self.seed)

    @override
    def configure_model(self) -> None:
        super().configure_model()
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == "fit":
            self._attach()
        else:
            self._merge()

    @override
    def teardown(self, stage: str) -> None:
        self._merge()

    def _attach(self) -> None:
        """From the plain model to one with the adapter in it."""
        if self.adapter.is_attached:
            return
        _ = self.base  # its hash is of the plain model
        self.model.requires_grad_(False)
        with torch.no_grad():
            for name, weight in self.adapter.base().items():
                if name in self._beneath:
                    weight.copy_(self._beneath[name])
        self._beneath = {}
        self.adapter.attach()

    def _merge(self) -> None:
        """From the model with the adapter in it to the plain one with the adapter's change."""
        if self._adapter is None or not self._adapter.is_attached:
            return
        weights = self._adapter.base()
        self._beneath = {name: weight.detach().clone() for name, weight in weights.items()}
        self._adapter.detach()
        self.delta.write_(self.model, self.edit_optimizer.originals)

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Has the plain model inside a ``with`` block."""
        was_attached = self._adapter is not None and self._adapter.is_attached
        self._merge()
        try:
            yield
        finally:
            if was_attached:
                self._attach()

    @contextmanager
    @override
    def base_weights(self) -> Iterator[None]:
        with self._plain(), super().base_weights():
            yield

    @override
    def tuned_parameters(self) -> list[nn.Parameter]:
        return self.adapter.parameters

    # -- edits ---------------------------------------------------------------------------------

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        batch = self._ended(batch).to(batch.input_ids.device)
        with self._plain():
            adapter = self._fresh_adapter()
            factors = adapter.parameters
            optimizer: Optimizer = self.make_optimizer(factors)
            loss = torch.zeros(())
            with adapter.attached():
                for _ in range(self.steps):
                    loss = self.batch_loss(batch)
                    gradients = torch.autograd.grad(loss, factors)
                    for factor, gradient in zip(factors, gradients, strict=True):
                        factor.grad = gradient
                    optimizer.step()
                edit = WeightDelta(adapter.changes())
                return self._described(edit, batch, float(loss.detach()))

    @property
    @override
    def delta(self) -> WeightDelta:
        """(alpha/r) B A of the adapter, and what else was done to the weights beneath it."""
        if self._adapter is None:
            return super().delta
        changes = self._adapter.changes()
        delta = WeightDelta({n: c for n, c in changes.items() if bool(c.u.any() and c.v.any())})
        delta = delta + WeightDelta.between(self.edit_optimizer.originals, self._weights_beneath())
        ids = tuple(self._rows)
        delta.provenance = replace(delta.provenance, request_ids=ids)
        return delta

    def _weights_beneath(self) -> dict[str, Tensor]:
        weights = self._beneath or {n: w.detach() for n, w in self.adapter.base().items()}
        originals = self.edit_optimizer.originals
        return {name: weight.to(originals[name].device) for name, weight in weights.items()}

    @override
    def committed(self) -> WeightDelta:
        with self._plain():
            return super().committed()

    @override
    def _settle(self, delta: WeightDelta) -> None:
        if self._adapter is None or not self._adapter.is_attached:
            super()._settle(delta)

    # -- checkpoints ---------------------------------------------------------------------------

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] = {
            f"model.{name}": tensor.detach() for name, tensor in self.adapter.state().items()
        }
        for name, weight in self._weights_beneath().items():
            if not torch.equal(weight, self.edit_optimizer.originals[name]):
                checkpoint["state_dict"][f"model.{name}"] = weight

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        self.adapter.load({name.removeprefix("model."): t for name, t in state.items()})
        was_attached = self.adapter.is_attached
        self._attach()
        with torch.no_grad():
            for name, weight in self.adapter.base().items():
                weight.copy_(state.get(f"model.{name}", self.edit_optimizer.originals[name]))
        if not was_attached:
            # The plain model gets the change, and the layers, which are not in it, have theirs.
            self._merge()
            checkpoint["state_dict"] = {}
