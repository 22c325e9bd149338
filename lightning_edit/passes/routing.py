# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Which experts tokens are sent to."""

# Shapes: T tokens of a row, E experts of a layer, D hidden.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_edit.core.batch import pad_rows
from lightning_edit.core.locator import ModelTree
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.hooks import hooked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["expert_sets"]

MAX_ROWS = 64  # rows that are run at once


@torch.no_grad()
def expert_sets(
    tree: ModelTree, layers: Sequence[int], rows: Sequence[Sequence[int]], pad_id: int
) -> list[dict[int, Tensor]]:
    """Which experts each token of some rows is sent to.

    Args:
        tree: A decoder-only model.
        layers: Layers that are mixtures of experts; see ``ModelTree.mixtures``.
        rows: Token ids.
        pad_id: Fills the gaps.

    Returns:
        For each row, layer to the experts of its tokens, [T, E] bool.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> tree = ModelTree.of(tiny_model())
        >>> expert_sets(tree, tree.mixtures, [[5, 6, 7]], 0)
        [{}]
    """
    model: PreTrainedModel = tree.model
    device = next(tree.blocks[0].parameters()).device
    sites = {layer: tree.expert_site(layer) for layer in layers}
    found: list[dict[int, Tensor]] = []
    for start in range(0, len(rows), MAX_ROWS) if sites else ():
        some = rows[start : start + MAX_ROWS]
        ids, mask = (part.to(device) for part in pad_rows(some, pad_id))
        seen: dict[int, Tensor] = {}

        def taker(layer: int, kept: Tensor, seen: dict[int, Tensor]) -> Callable[..., None]:
            def take(_: nn.Module, args: tuple[Tensor, ...], __: object) -> None:
                states = args[0].reshape(-1, args[0].shape[-1])[kept]
                seen[layer] = sites[layer].sets(model, states)

            return take

        kept = mask.flatten().bool()
        takers = {s.module(model): taker(layer, kept, seen) for layer, s in sites.items()}
        with borrowed(model), hooked(before=takers):
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        lengths = [len(row) for row in some]
        parts = {layer: torch.split(sets, lengths) for layer, sets in seen.items()}
        found += [{layer: sets[n] for layer, sets in parts.items()} for n in range(len(some))]
    return found or [{} for _ in rows]
