# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of all parameters."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.locator import ModelTree
from lightning_edit.modules.fine_tuning.inner_loop import parameter_names
from lightning_edit.modules.fine_tuning.tuning import TuningModule

__all__ = ["FullTuning"]


class FullTuning(TuningModule):
    """Fine-tunes every parameter, by Lightning's own loop, on the target tokens of all edits.

    The loss is the mean over the target tokens of a mini-batch. With the callback
    ``TaskVectorForgetting`` it is F-Learning.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Tune only the parameters of these layers; negative ones count from the end. The
            whole model, embeddings included, if None.
        lr: Learning rate of Adam.
        kwargs: Further arguments of ``TuningModule``.

    Examples:
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> model, tokenizer = trained_tiny_model()
        >>> editor = FullTuning.from_model(model, tokenizer, lr=1e-3, steps=10)
        >>> edit = editor.edit(tiny_requests(1))
        >>> edit.details["requests"][0]["p_target"] > 0.9
        True

    References:
        Forgetting before Learning, arXiv 2311.08011, section 4 (the settings).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2311.08011"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        lr: float = 5e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, lr=lr, **kwargs)

    @override
    def edited_names(self, tree: ModelTree) -> list[str]:
        return parameter_names(tree, self.layers)

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        return self.tune(batch)
