# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The search for target values, shared out among processes."""

# Shapes: E requests, T templates, C outputs that change, D hidden, M inputs of the edited
# projection.

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest
from lightning_edit.modules.locate_then_edit.target_values import (
    LOSSES,
    TargetValues,
    TargetValueSettings,
    optimize_target_values,
)

__all__ = ["search_target_values"]


def search_target_values(
    tree: ModelTree,
    tokens: PromptTokenizer,
    layer: int,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
    settings: TargetValueSettings,
    *,
    processes: Processes,
    dtype: torch.dtype | None = None,
) -> TargetValues:
    """Target values of requests, of which each process searches those of its share.

    Args:
        tree: A decoder-only model.
        tokens: Its tokenizer.
        layer: Layer whose output changes.
        requests: E edit requests, the same on all processes.
        templates: T context templates, the first of them ``"{}"``.
        settings: How to optimize.
        processes: Those that all call.
        dtype: Precision of the passes' matrix products, if lower than the model's.

    Returns:
        Target values of all requests in their order, the same bits on every process.
    """
    count, width = len(requests), len(templates)
    mine = [requests[i] for i in processes.share(count)]

    def search(some: Sequence[EditRequest]) -> TargetValues:
        return optimize_target_values(tree, tokens, layer, some, templates, settings, dtype=dtype)

    if processes.count == 1:
        return search(requests)
    found = search(mine) if mine else None
    site = tree.mlp_site(layer)
    device = next(tree.blocks[0].parameters()).device
    like = torch.zeros((), device=device)

    def merged(rows: Tensor | None, *shape: int) -> Tensor:
        return processes.merged(rows, (count, *shape), like)

    features, places = site.out_features, 2 if settings.place == "sublayers" else 0
    # Every process calls for each of these, whether it has a share or not.
    keys = merged(found.keys if found else None, width, site.in_features)
    outputs = merged(found.outputs if found else None, width, features)
    deltas = merged(found.deltas if found else None, features)
    attention = merged(found.attention if found else None, places, features)
    passes = merged(_losses(found, settings.steps) if found else None, settings.steps, len(LOSSES))
    figures = merged(_figures(found) if found else None, 3).tolist()
    table = cast(list[list[list[float]]], passes.tolist())
    return TargetValues(
        keys,
        outputs,
        deltas,
        attention,
        [
            [dict(zip(LOSSES, row, strict=True)) for row in rows[: int(n)]]
            for rows, (n, _, _) in zip(table, figures, strict=True)
        ],
        [probability for _, probability, _ in figures],
        {e: int(step) for e, (_, _, step) in enumerate(figures) if step},
    )


def _losses(found: TargetValues, steps: int) -> Tensor:
    """Losses of each request at each pass, 0 after its last one, [E, steps, 4]."""
    losses = torch.zeros(len(found.losses), steps, len(LOSSES))
    for e, passes in enumerate(found.losses):
        losses[e, : len(passes)] = torch.tensor([[one[name] for name in LOSSES] for one in passes])
    return losses


def _figures(found: TargetValues) -> Tensor:
    """Passes, probability and the pass of failure, 0 for none, of each request: [E, 3]."""
    return torch.tensor(
        [
            [float(len(passes)), found.probabilities[e], float(found.failed.get(e, 0))]
            for e, passes in enumerate(found.losses)
        ]
    )
