# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors that fine-tune weights by Lightning's own loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.sharding import whole_tensor
from lightning_edit.modules.fine_tuning.descent import Descent
from lightning_edit.modules.fine_tuning.loop import LoopModule
from lightning_edit.passes.target_loss import target_probabilities

__all__ = ["TuningModule"]


class TuningModule(LoopModule[WeightDelta]):
    """Base of editors whose ``fit`` tunes weights: the MLP outputs of the layers, by Adam.

    What is committed is the difference of the tuned weights and the originals. A subclass chooses
    what is tuned, ``edited_names``.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to tune; negative ones count from the end. The method's default when None.
        lr: Learning rate of Adam.
        kwargs: Further arguments of ``LoopModule``.
    """

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        lr: float = 5e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, lr=lr, **kwargs)

    @override
    def tuned_parameters(self) -> list[nn.Parameter]:
        return list(self.target.parameters.values())

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self._settle(self.delta)

    # -- edits ---------------------------------------------------------------------------------

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        batch = self._ended(batch).to(batch.input_ids.device)
        descent = Descent(self.model, self.edited_names(self.tree), self.make_optimizer)
        loss = torch.zeros(())
        for _ in range(self.steps):
            loss = self.batch_loss(batch)
            descent.step(loss)
        return self._described(descent.delta(), batch, float(loss.detach()))

    def _described(self, edit: WeightDelta, batch: EditBatch, loss: float) -> WeightDelta:
        """The edit with its figures; it stands in the model."""
        norm = edit.norm()
        figures: RequestFigures = {"loss": loss, "steps": self.steps, "norm": norm}
        edit.details["requests"] = [
            {**figures, "id": request.id, "p_target": p}
            for request, p in zip(
                batch.requests, target_probabilities(self.tree, batch), strict=True
            )
        ]
        return edit

    @property
    @override
    def delta(self) -> WeightDelta:
        """The difference of the weights as they stand and the originals."""
        originals = {n: whole_tensor(t) for n, t in self.edit_optimizer.originals.items()}
        tuned = {
            name: whole_tensor(parameter.detach()).to(originals[name].device)
            for name, parameter in self.target.parameters.items()
        }
        delta = WeightDelta.between(originals, tuned)
        delta.provenance = replace(delta.provenance, request_ids=tuple(self._rows))
        return delta

    @override
    def committed(self) -> WeightDelta:
        delta = self.delta
        self._settle(delta)
        provenance = replace(self.provenance, request_ids=delta.provenance.request_ids)
        return WeightDelta(delta.changes, provenance).seal(
            self.model, self.edit_optimizer.originals
        )

    def _settle(self, delta: WeightDelta) -> None:
        """Sets the weights to original + change, which a last bit may tell from the tuned ones."""
        delta.write_(self.model, self.edit_optimizer.originals)
        self.edit_optimizer.delta = delta

    @override
    def on_test_start(self) -> None:
        self.edit_optimizer.delta = self.delta
        super().on_test_start()
