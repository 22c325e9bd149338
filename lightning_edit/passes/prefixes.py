# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Prompts that begin alike: what they share is read once."""

# Shapes: P tokens of a prefix.

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from lightning_edit.core.sharding import ends_whole

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["SharedPrefix", "shared_prefixes"]

SHORTEST = 64  # tokens of a prefix that is worth a pass of its own
LONG_ENOUGH = 0.8  # of what the others share, for one more prompt to join them

_Ids = tuple[int, ...]


def shared_prefixes(prompts: Sequence[_Ids]) -> dict[_Ids, list[_Ids]]:
    """Groups prompts by the tokens that they begin with.

    Args:
        prompts: Token ids of prompts.

    Returns:
        What two or more prompts begin with, at least 64 tokens and fewer than the shortest of them
        has, and these prompts. Others are left out.

    Examples:
        >>> told = tuple(range(100))
        >>> [(prefix, group)] = shared_prefixes([(*told, 1), (7, 8), (*told, 2, 3)]).items()
        >>> len(prefix), len(group)
        (100, 2)
    """
    groups: dict[_Ids, list[_Ids]] = {}
    group: list[_Ids] = []
    shared = 0  # tokens that the group has in common
    for prompt in sorted(dict.fromkeys(prompts)):
        alike = 0
        if group:
            pairs = zip(group[-1][:-1], prompt[:-1], strict=False)
            alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if alike >= max(SHORTEST, LONG_ENOUGH * shared):
            shared = min(shared or alike, alike)
            group.append(prompt)
        else:
            if shared:
                groups[group[0][:shared]] = group
            group, shared = [prompt], 0
    if shared:
        groups[group[0][:shared]] = group
    return groups


class SharedPrefix:
    """Keys and values of the tokens that several prompts begin with, read once.

    Args:
        model: A Hugging Face decoder-only language model.
        ids: The tokens, P.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]) -> None:
        from transformers import DynamicCache

        device = next(model.parameters()).device
        cache = DynamicCache()
        row = torch.tensor([list(ids)], device=device)
        with ends_whole(model):
            model.base_model(input_ids=row, cache=cache, use_cache=True)
        self.length = len(ids)
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]

    def cache(self, rows: int) -> Cache:
        """A cache for so many rows that go on from the prefix."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for i, (keys, values) in enumerate(self._layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), i)
        return cache
