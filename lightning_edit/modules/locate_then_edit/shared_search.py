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
    count = len(requests)
    mine = [requests[i] for i in processes.share(count)]

    def search(some: Sequence[EditRequest]) -> TargetValues:
        return optimize_target_values(tree, tokens, layer, some, templates, settings, dtype=dtype)

    if processes.count == 1:
        return search(requests)
    found = search(mine) if mine else None
    site = tree.mlp_out(layer)
    passes = torch.zeros(len(mine), settings.steps, len(LOSSES))
    steps, failed, probabilities = (torch.zeros(len(mine)) for _ in range(3))
    if found is not None:
        for e, one in enumerate(found.losses):
            passes[e, : len(one)] = torch.tensor([[step[name] for name in LOSSES] for step in one])
            steps[e], failed[e] = len(one), found.failed.get(e, 0)
        probabilities = torch.tensor(found.probabilities)
    device = next(tree.blocks[0].parameters()).device
    like = torch.zeros((), device=device)

    def merged(rows: Tensor | None, *shape: int) -> Tensor:
        return processes.merged(rows, (count, *shape), like)

    width, features = len(templates), site.out_features
    places = 2 if settings.place == "sublayers" else 0
    # Every process calls for each of these, whether it has a share or not.
    keys = merged(found.keys if found else None, width, site.in_features)
    outputs = merged(found.outputs if found else None, width, features)
    deltas = merged(found.deltas if found else None, features)
    attention = merged(found.attention if found else None, places, features)
    table = cast(list[list[list[float]]], merged(passes, settings.steps, len(LOSSES)).tolist())
    counts = merged(steps).int().tolist()
    broken = merged(failed).int().tolist()
    return TargetValues(
        keys,
        outputs,
        deltas,
        attention,
        [
            [dict(zip(LOSSES, row, strict=True)) for row in one[:n]]
            for one, n in zip(table, counts, strict=True)
        ],
        merged(probabilities).tolist(),
        {e: step for e, step in enumerate(broken) if step},
    )
