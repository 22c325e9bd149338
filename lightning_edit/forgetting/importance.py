# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Where a model keeps what is to be forgotten, rather than what is to be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_edit.core.batch import EditBatch, PromptTokenizer
from lightning_edit.core.change import Change
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ModelError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.request import EditRequest
from lightning_edit.core.sharding import is_sharded
from lightning_edit.core.wrappers import plain_names
from lightning_edit.functional.task_vector import forgetting_importance
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.target_loss import target_nll

__all__ = ["fisher_diagonals", "weighted"]


def fisher_diagonals(
    model: nn.Module,
    tokens: PromptTokenizer,
    requests: Sequence[EditRequest],
    names: Sequence[str],
) -> dict[str, Tensor]:
    """The empirical Fisher information of some answers: mean square of each one's gradient.

    A pass for each request, forward and backward.

    Args:
        model: A language model with whole weights; it comes back as it was.
        tokens: Its tokenizer.
        requests: Their new answers count, given the prompts.
        names: Parameters, by the plain model's names.

    Returns:
        Name to the diagonal, float32, of the parameter's shape and on its device; zeros where
        there is no request.

    Raises:
        ModelError: If the weights are sharded.

    Examples:
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> model, tokenizer = trained_tiny_model()
        >>> names = ["model.layers.2.mlp.down_proj.weight"]
        >>> found = fisher_diagonals(model, PromptTokenizer(tokenizer), tiny_requests(2), names)
        >>> bool((found[names[0]] >= 0).all()), bool(found[names[0]].any())
        (True, True)
    """
    if is_sharded(model):
        raise ModelError(
            "The importance of each parameter is found by gradients of whole weights, but the "
            "model's are sharded. Use one device or DDP, or forget without `retain`."
        )
    actual = plain_names(model)
    named = dict(model.named_parameters())
    parameters = {name: named[actual[name]] for name in names}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    tree = ModelTree.of(model)
    with borrowed(model, [actual[name] for name in names]), torch.enable_grad():
        for request in requests:
            batch = EditBatch.from_requests([request], tokens)
            loss = target_nll(tree, batch.to(next(model.parameters()).device)).sum()
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    sums[name] += gradient.float().square() / len(requests)
    return sums


def weighted(
    vector: WeightDelta,
    forget: Mapping[str, Tensor],
    retain: Mapping[str, Tensor],
    alpha: float = 1.0,
) -> WeightDelta:
    """S τ: a task vector that spares what the answers to be kept need.

    Args:
        vector: τ. The change of an adapter becomes dense, for s τ has no low rank.
        forget: Diagonals of the Fisher information of what τ is to take out, by τ's names.
        retain: The same of what is to be kept.
        alpha: Weight of the latter.

    Returns:
        s τ, float32 on the CPU.

    Examples:
        >>> tau = WeightDelta({"weight": torch.ones(1, 2)})
        >>> forget, retain = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]])
        >>> weighted(tau, {"weight": forget}, {"weight": retain}).dense("weight").tolist()
        [[1.0, 0.5]]
    """
    changes: dict[str, Change] = {}
    for name in vector.changes:
        s = forgetting_importance(forget[name], retain[name], alpha)
        changes[name] = (s * vector.dense(name).to(s.device)).cpu()
    return WeightDelta(changes)
