# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""FT, FT-L and FT-M: a few steps of Adam on a few weights, edit by edit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from torch import nn
from torch.optim import Adam, Optimizer
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.locator import ModelTree
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.fine_tuning.inner_loop import InnerLoop, parameter_names
from lightning_edit.passes.replay import blocks_before, replayed
from lightning_edit.passes.target_loss import (
    Objective,
    row_means,
    target_nll,
)

__all__ = ["FineTune"]

REPLAYED_CHUNKS = 16  # chunks of which is kept what the blocks below return


class FineTune(EditModule):
    """Fine-tuning as an editor: FT, and by its options FT-L and FT-M.

    Adam makes up to ``steps`` passes over the requests of a batch, a chunk of them at a time. A
    chunk whose loss is below ``stop_loss`` makes no step; the edit is done when the mean loss of
    a pass is. What the names mean: **FT-L** of the ROME and MEMIT papers is ``norm_constraint``,
    **FT-M** of EasyEdit is the default objective, and what EasyEdit calls FT-L is
    ``objective="prompt_last"``. The options are independent of each other.

    Once the step of Adam exceeds ``norm_constraint``, the constraint is met with equality after
    one step, and further steps change little.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. The one at 0.7 of the depth if
            None.
        parameters: What is tuned: ``mlp_out``, the MLPs' output projections of the layers, or
            ``all``, every parameter of the layers (of the whole model where ``layers`` is None).
        objective: ``target_new`` reads each token of the target behind the ones before it.
            ``prompt_last`` reads all of them right behind the prompt, which is wrong for targets
            of more than one token.
        norm_constraint: Bound on the change of every weight (L∞), around the weights at the start
            of the edit; none if None.
        steps: Passes over the requests, at most.
        lr: Learning rate of Adam.
        weight_decay: Weight decay of Adam.
        chunk_size: Requests in a step of Adam.
        stop_loss: Loss in nats below which nothing more is learned.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].

    References:
        Modifying Memories in Transformer Models, arXiv 2012.00363, section 4 (the constraint);
        EasyEdit, arXiv 2308.07269 (FT-M).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2012.00363"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        parameters: Literal["mlp_out", "all"] = "mlp_out",
        objective: Objective = "target_new",
        norm_constraint: float | None = None,
        steps: int = 25,
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        chunk_size: int = 1,
        stop_loss: float = 1e-2,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        for name, value in (("steps", steps), ("chunk_size", chunk_size)):
            if value < 1:
                raise ValueError(f"`{name}` is expected to be at least 1, but got {value}.")
        if norm_constraint is not None and norm_constraint <= 0:
            raise ValueError(
                f"`norm_constraint` is expected to be above 0, or None for no constraint, but got "
                f"{norm_constraint}."
            )
        self.parameters_kind = parameters
        self.objective: Objective = objective
        self.norm_constraint = norm_constraint
        self.steps = steps
        self.lr = lr
        self.weight_decay = weight_decay
        self.chunk_size = chunk_size
        self.stop_loss = stop_loss

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        return [min(round(0.7 * len(tree.blocks)), len(tree.blocks) - 1)]

    @override
    def edited_names(self, tree: ModelTree) -> list[str]:
        if self.parameters_kind == "all":
            return parameter_names(tree, self.layers)
        return super().edited_names(tree)

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        tree = self.tree

        def adam(parameters: Iterable[nn.Parameter]) -> Optimizer:
            return Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)

        names = self.edited_names(tree)
        inner = InnerLoop(self.model, names, adam, self.norm_constraint)
        count = len(batch)
        chunks = [
            range(start, min(start + self.chunk_size, count))
            for start in range(0, count, self.chunk_size)
        ]
        below = blocks_before(tree, names) if len(chunks) <= REPLAYED_CHUNKS else []
        kept: list[dict[nn.Module, object]] = [{} for _ in chunks]
        losses: list[list[float]] = [[] for _ in range(count)]
        steps = [0] * count
        for _ in range(self.steps):
            for chunk, outputs in zip(chunks, kept, strict=True):
                part = batch.select(chunk)
                with replayed(below, outputs):
                    means = row_means(target_nll(tree, part, self.objective), part.labels)
                for e, mean in zip(chunk, means.tolist(), strict=True):
                    losses[e].append(mean)
                loss = means.mean()
                if float(loss.detach()) >= self.stop_loss:
                    inner.step(loss)
                    for e in chunk:
                        steps[e] += 1
            if sum(seen[-1] for seen in losses) / count < self.stop_loss:
                break
        edit = inner.delta()
        norm = edit.norm()
        edit.details = {
            "losses": losses,
            "requests": [
                {
                    "id": request.id,
                    "searched_loss": losses[e][-1],
                    "steps": steps[e],
                    "norm": norm,
                }
                for e, request in enumerate(batch.requests)
            ],
        }
        return edit
