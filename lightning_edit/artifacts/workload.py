# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What an edit by a locate-then-edit method consists of, as operations, bytes read and memory."""

# Shapes: R rows (contexts and the anchor prompt), P tokens of a prompt, T tokens from the subject's
# end on, M inputs and D outputs of an edited matrix.

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_edit.core.locator import MLPSite, ModelTree
from lightning_edit.functional.costs import (
    carried_bytes,
    dense_operations,
    gathered_bytes,
    reduced_bytes,
    search_bytes,
    solve_operations,
    sum_bytes,
)

__all__ = ["Workload", "measured_bandwidth", "measured_rate"]

# How often an edited matrix is read or written for an edit: tried, written, checked and measured.
PASSES_OVER_MATRIX = 16
GATHERED_AT_ONCE = 3


@dataclass(frozen=True)
class Workload:
    """An edit of a model of some size.

    Args:
        outline: The model; its weights are not read.
        sites: The matrices to edit.
        item: Bytes of an entry of the weights.
        contexts: Contexts of a prompt.
        prompt: P.
        tail: T.
        answer: Tokens of an answer.
        steps: Passes of a search.
        spreads: Whether edited layers are written one after another, each with new keys.
        carries: Whether the keys of earlier edits are kept.
        tokens: Tokens that second moments are estimated from.
        edits: Edits that follow one another.
    """

    outline: nn.Module
    sites: Sequence[MLPSite]
    item: int
    contexts: int
    prompt: int
    tail: int
    answer: int
    steps: int
    spreads: bool
    carries: bool
    tokens: int
    edits: int

    @property
    def rows(self) -> int:
        """R."""
        return self.contexts + 1

    @property
    def blocks(self) -> list[int]:
        """Entries of the matrices of each block."""
        return [sum(map(_entries, b.parameters())) for b in ModelTree.of(self.outline).blocks]

    @property
    def vocabulary(self) -> tuple[int, int]:
        """Rows and columns of the projection to the vocabulary."""
        tree = ModelTree.of(self.outline)
        head = tree.lm_head if tree.lm_head is not None else tree.input_embeddings
        weight = None if head is None else head.get_parameter("weight")
        return (0, 0) if weight is None else (weight.shape[0], weight.shape[1])

    @property
    def first(self) -> int:
        """The block that a search begins in."""
        return max(site.layer for site in self.sites)

    def operations(self) -> dict[str, float]:
        """Floating-point operations by part of an edit; of all edits, under ``once``."""
        blocks, head = self.blocks, self.vocabulary[0] * self.vocabulary[1]
        read = self.contexts * self.answer + 1
        below = sum(blocks[: self.first + 1])
        solves = [solve_operations(site.in_features, 1) for site in self.sites]
        terms = min(self.edits, 64)
        search = dense_operations(sum(blocks[self.first :]), self.rows * self.tail, backward=True)
        return {
            "capture": dense_operations(sum(blocks), self.rows * self.prompt),
            "search": self.steps * (search + dense_operations(head, read, backward=True)),
            "keys": self.spreads * dense_operations(below, self.contexts * self.prompt),
            "solve": sum(each for _, each in solves),
            "write": sum(4 * 2 * s.out_features * s.in_features * terms for s in self.sites),
            "measure": dense_operations(sum(blocks) + head, self.prompt),
            "once": dense_operations(below, self.tokens) + sum(factor for factor, _ in solves),
        }

    def bytes_read(self) -> dict[str, float]:
        """Bytes of weights and matrices that each part reads or writes."""
        blocks, head = self.blocks, self.vocabulary[0] * self.vocabulary[1]
        squares = sum(site.in_features**2 for site in self.sites)
        return {
            "capture": self.item * sum(blocks),
            "search": self.steps * 2 * self.item * (sum(blocks[self.first :]) + head),
            "keys": self.spreads * self.item * sum(blocks[: self.first + 1]),
            "solve": 2 * 8 * squares,
            "write": PASSES_OVER_MATRIX * 4 * self._edited,
            "measure": self.item * (sum(blocks) + head),
            "once": 8 * squares,
        }

    def memory(self, devices: int) -> dict[str, int]:
        """Bytes that each device holds at the same time, by part."""
        blocks, total = self.blocks, sum(p.numel() for p in self.outline.parameters())
        squares = sum(site.in_features**2 for site in self.sites)
        outside = total - sum(blocks)
        words, hidden = self.vocabulary
        depth = len(blocks) - self.first
        inner = max(site.in_features for site in self.sites)
        sums = [sum_bytes(s.out_features, s.in_features, self.edits) for s in self.sites]
        # FSDP2 has a block, the buffer that it came in, and that of the one before, all at once.
        gathered = self.item * (GATHERED_AT_ONCE * max(blocks) + outside) if devices > 1 else 0
        return {
            "weights": self.item * total // devices,
            "gathered": gathered,
            "originals": self.item * self._edited // devices,
            "kept while an edit is made": self.item * self._edited // devices,
            "second moments": 4 * squares // devices,
            "their factors": 8 * squares,
            "sum of edits": sum(sums),
            "earlier keys": self.carries
            * sum(carried_bytes(site.in_features, self.edits) for site in self.sites),
            "search": search_bytes(hidden, inner, words, self.rows, self.tail, depth),
            "writing": 3 * 4 * max(s.out_features * s.in_features for s in self.sites) // devices,
        }

    def appended(self) -> int:
        """Bytes that a checkpoint adds for an edit: its factors of rank one, and its key."""
        return sum(
            4 * (site.out_features + (1 + self.carries) * site.in_features) for site in self.sites
        )

    def sent(self, devices: int, *, by_rows: bool) -> float:
        """Bytes that each device receives in an edit.

        Args:
            devices: How many share the weights.
            by_rows: Whether weights are gathered block by block (FSDP2), or each device keeps its
                part and activations are added up (TP).
        """
        blocks = self.blocks
        above = sum(blocks[self.first :])
        if by_rows:
            # What a search runs is checked first against a pass of the whole model.
            passes = sum(blocks) * (3 + self.spreads) + (self.steps * 2 + 1) * above
            ends = sum(p.numel() for p in self.outline.parameters()) - sum(blocks)
            return gathered_bytes(self.item * (passes + 2 * ends), devices)
        depth = len(blocks) - self.first
        tokens = len(blocks) * self.rows * self.prompt * (1 + self.spreads)
        tokens += self.steps * 2 * depth * self.rows * self.tail
        # After attention and after the MLP of each block.
        return reduced_bytes(2 * 4 * self.vocabulary[1] * tokens, devices)

    @property
    def _edited(self) -> int:
        return sum(site.out_features * site.in_features for site in self.sites)


def _entries(parameter: nn.Parameter) -> int:
    return parameter.numel() if parameter.ndim > 1 else 0


def measured_rate(size: int = 1024) -> float:
    """Operations that this machine's device does a second, by a product of matrices.

    Args:
        size: Their width.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(size, size, device=device)
    return 2 * size**3 / _seconds(lambda: matrix @ matrix)


def measured_bandwidth(entries: int = 2**25) -> float:
    """Bytes that this machine's device reads and writes a second, by a copy.

    Args:
        entries: How many numbers are copied.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(entries, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def _seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """Seconds that work takes, the fastest of several times."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)
