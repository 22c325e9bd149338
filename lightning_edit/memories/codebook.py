# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A codebook beside one linear layer: near a key, its value is what the layer returns."""

# Shapes: N entries, I inputs of the layer, O its outputs, B rows, T positions.

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_edit.core.locator import StackKind
from lightning_edit.core.sharding import plain
from lightning_edit.core.side_memory import MemoryEntry
from lightning_edit.functional.codebook import Replacement, nearest_keys, replace_outputs
from lightning_edit.memories.routed import LayerMemory

__all__ = ["Codebook"]


class Codebook(LayerMemory):
    """Keys, values and radii of GRACE (arXiv 2211.11031), looked up once for each prompt.

    The query is the layer's input at the last token of a prompt, or at a decoder's first token
    where an encoder reads the prompt. In a pass over whole rows, of which nobody has told where
    their prompts end, the first token that an entry answers ends one. If the query lies within the
    radius of the nearest key, that key's value takes the place of the layer's output; else the
    output keeps its bits.

    Its buffers are ``keys`` [N, I], ``values`` [N, O] and ``radii`` [N], float32. What is kept of
    each request is its distance from the key.

    Args:
        module: Name of the linear layer in the model.
        stack: The stack that the layer is in.
        replacement: Where the value is put: at the query (``last``), at all positions of the
            ``prompt`` before it, or at ``all``, those of generated tokens included.
    """

    fields: ClassVar[tuple[str, ...]] = ("keys", "values", "radii")
    keys: Tensor
    values: Tensor
    radii: Tensor

    def __init__(
        self, module: str, stack: StackKind = "decoder", replacement: Replacement = "last"
    ) -> None:
        super().__init__(module=module, stack=stack, replacement=replacement)
        self.replacement: Replacement = replacement

    @override
    def narrowed(self, entry: MemoryEntry) -> MemoryEntry:
        """The radius shrinks to what the remaining requests need, and never grows."""
        needed = max(float(kept["distance"]) for kept in entry.requests.values())
        radius = min(float(entry.tensors["radii"]), max(needed, entry.notes["initial_radius"]))
        radii = torch.full_like(entry.tensors["radii"], radius)
        return replace(entry, tensors={**entry.tensors, "radii": radii})

    def lookup(self, queries: Tensor) -> Tensor:
        """Index of the entry that answers each query, −1 where none does.

        Args:
            queries: Inputs of the layer, [B, I].

        Returns:
            [B] int64.
        """
        distances, indices = nearest_keys(queries, self.keys)
        return torch.where(distances <= self.radii[indices], indices, -1)

    def _first_answered(self, inputs: Tensor, last: Tensor) -> Tensor:
        """The first position of each row that an entry answers, its last where none does, [B]."""
        found = self.lookup(inputs.flatten(0, 1)).reshape(inputs.shape[:2]) >= 0
        found &= cast(Tensor, self.router.attended)
        return torch.where(found.any(1), found.long().argmax(1), last)

    @override
    def answer(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        router = self.router
        if self.is_off or (router.positions is None and router.route is None):
            return None
        asked = router.positions
        if asked is not None:
            # Some models flatten rows and positions before the MLP.
            inputs = plain(args[0])
            inputs = inputs.reshape(len(asked), -1, inputs.shape[-1])
            rows = torch.arange(len(asked), device=asked.device)
            if router.is_plain:
                asked = router.positions = self._first_answered(inputs, asked)
            router.decide(self.lookup(inputs[rows, asked]))
        elif self.replacement != "all":
            return None  # the prompt's keys and values are in the cache, with what was replaced
        route = cast(Tensor, router.route)
        hits = route >= 0
        if not bool(hits.any()):
            return None
        at = torch.zeros_like(route) if asked is None else asked
        outputs = output.reshape(len(route), -1, output.shape[-1])
        values = self.values[route.clamp_min(0)]
        return replace_outputs(outputs, values, hits, at, self.replacement).reshape(output.shape)
