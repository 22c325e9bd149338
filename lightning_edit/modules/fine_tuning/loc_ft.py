# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""LocFT-BF: localized, breadth-first fine-tuning."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.locator import ModelTree
from lightning_edit.modules.fine_tuning.tuning import TuningModule

__all__ = ["LocFT"]


class LocFT(TuningModule):
    """LocFT-BF: fine-tunes one MLP output matrix, breadth-first: epochs over all the edits.

    Editors usually go depth-first, optimizing each request until it is learned before they turn
    to the next, which then undoes it. Ordinary epochs of mini-batches keep them all. The loss is
    the mean over sequences of the mean over target tokens, end token included, so that the model
    stops where the answer ends. The Trainer's ``max_epochs`` (25 in the paper's settings) and the
    data module's ``batch_size`` (100) set the rest.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to tune; negative ones count from the end. The one at 0.7 of the depth if
            None, as in the paper's settings for Llama 3 (layer 22 of 32).
        lr: Learning rate of Adam.
        end_token: Teach the end token after each answer of a decoder-only model.
        kwargs: Further arguments of ``TuningModule``.

    Examples:
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> model, tokenizer = trained_tiny_model()
        >>> editor = LocFT.from_model(model, tokenizer, lr=5e-3)
        >>> edit = editor.edit(tiny_requests(2))
        >>> edit
        WeightDelta(model.layers.3.mlp.down_proj.weight: dense)
        >>> min(row["p_target"] for row in edit.details["requests"]) > 0.5
        True

    References:
        Fine-tuning Done Right in Model Editing, arXiv 2509.22072, and the settings of its code.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2509.22072"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")
    per_sequence: ClassVar[bool] = True

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        lr: float = 5e-4,
        end_token: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, lr=lr, end_token=end_token, **kwargs)

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        return [min(round(0.7 * len(tree.blocks)), len(tree.blocks) - 1)]

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        return self.tune(batch)
