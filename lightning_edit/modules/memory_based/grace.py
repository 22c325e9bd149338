# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""GRACE: a codebook beside one layer, whose values answer near their keys."""

# Shapes: B requests, R requests of a wave, N entries, I inputs of the layer, O its outputs.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.errors import EditError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.locator import Locator, MLPSite, ModelTree, ModuleKind, StackKind
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.sharding import plain, splits_outputs
from lightning_edit.core.side_memory import MemoryEntry
from lightning_edit.functional.codebook import (
    Replacement,
    deferral_radii,
    nearest_keys,
    replace_outputs,
)
from lightning_edit.memories.codebook import Codebook
from lightning_edit.modules.memory_based.base import MemoryModule
from lightning_edit.passes.block_recorder import BlockOutput, hidden_states, with_hidden_states
from lightning_edit.passes.hooks import hooked
from lightning_edit.passes.replay import blocks_below, replayed
from lightning_edit.passes.target_loss import row_means, target_nll

__all__ = ["GRACE"]


class GRACE(MemoryModule):
    """General retrieval adaptors: a layer's output is replaced near the keys of a codebook.

    The key of an edit is the layer's input at the last token of its prompt. An edit far from all
    keys gets an entry of its own; one near a key of the same answer is covered by that key, whose
    radius grows; one near a key of another answer splits the space between them half way, and one
    at the very key of another answer takes its place. Then only the value of its entry is learned,
    by Adam, with the layers below run once.

    Outside all radii the model is the base, bit for bit. What it costs to run is the distance of
    one hidden state from all keys, once a prompt. Keys lie closer together by wording than by
    meaning: a small radius answers the prompt alone, and a large one other prompts, too. After a
    split, requests that a radius had grown for may lie outside of it; ``details`` names them as
    ``dropped``.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: The layer, one; at 0.7 of the depth if None.
        module: Which linear map of the layer; ``mlp_in`` where the MLP is not gated.
        stack: The stack of an encoder-decoder model. In the encoder a prompt is asked at its last
            token, in the decoder at the first.
        radius: ε₀, the radius of a new key, in the length of the layer's inputs.
        expansion: When a radius grows to cover a request, ``moving_average`` also moves the key
            half of the way to it; ``coverage`` leaves it.
        replacement: Where the value is put: at the query (``last``), at all positions of the
            ``prompt`` before it, as the authors' code does by default, or at ``all``, those of
            generated tokens included.
        value_init: A value begins as uniform noise (``cold``) or as the layer's own output
            (``warm``).
        steps: Steps of Adam for a value, at most.
        lr: Learning rate of Adam.
        stop_loss: Loss in nats below which a value is learned; 0 makes all steps.
        seed: Seed of the noise; the n-th entry begins from seed + n.
        max_entries: Entries that the memory may hold; any number if None.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].

    Raises:
        EditError: If more than one layer or linear map is named.

    References:
        Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors,
        arXiv 2211.11031, section 3.

    Examples:
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> editor = GRACE.from_model(*trained_tiny_model(), radius=0.5, steps=5)
        >>> edit = editor.edit(tiny_requests(2))
        >>> [row["placed"] for row in edit.details["requests"]]
        ['added', 'added']
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2211.11031"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        module: ModuleKind = "mlp_out",
        stack: StackKind = "decoder",
        radius: float = 1.0,
        expansion: Literal["coverage", "moving_average"] = "coverage",
        replacement: Replacement = "last",
        value_init: Literal["cold", "warm"] = "cold",
        steps: int = 100,
        lr: float = 1.0,
        stop_loss: float = 1e-2,
        seed: int = 0,
        max_entries: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, max_entries, **kwargs)
        if steps < 1:
            raise ValueError(f"`steps` is expected to be at least 1, but got {steps}.")
        if radius <= 0:
            raise ValueError(f"`radius` is expected to be above 0, but got {radius}.")
        self.module = module
        self.stack: StackKind = stack
        self.radius = radius
        self.expansion = expansion
        self.replacement: Replacement = replacement
        self.value_init = value_init
        self.steps = steps
        self.lr = lr
        self.stop_loss = stop_loss
        self.seed = seed

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        return [min(round(0.7 * len(tree.blocks)), len(tree.blocks) - 1)]

    @override
    def build_memory(self, tree: ModelTree) -> Codebook:
        return Codebook(self._site(tree).module_name, self.stack, self.replacement)

    def initial_values(self, outputs: Tensor, first: int) -> Tensor:
        """Values before they are learned.

        Args:
            outputs: What the layer itself returns at the queries, [B, O].
            first: Number of entries before these.

        Returns:
            [B, O] float32.
        """
        if self.value_init == "warm":
            return outputs.float()
        rows = [
            torch.rand(outputs.shape[1], generator=torch.Generator().manual_seed(self.seed + n))
            for n in range(first, first + len(outputs))
        ]
        return torch.stack(rows).to(outputs.device)

    @override
    def compute_edit(self, batch: EditBatch) -> MemoryWrite:
        tree = ModelTree.of(self.model, self.stack)
        layer = self._site(tree).module(self.model)
        entries = self.entries_without([request.id for request in batch.requests])
        positions = self._positions(tree, batch)
        with self.memory.off():
            queries, outputs = self._states(tree, layer, batch, positions)
            values = self.initial_values(outputs, len(entries))
            rows = [
                self._place(entries, batch, b, queries[b], values[b]) for b in range(len(batch))
            ]
            self.check_budget(entries)
            losses: list[list[float]] = [[] for _ in rows]
            for wave in _waves([row["entry"] for row in rows]):
                figures = [rows[b] for b in wave]
                learned = self._learn(tree, layer, batch.select(wave), figures, entries)
                for b, own in zip(wave, learned, strict=True):
                    losses[b] = own
        edit = self.memory_write(entries)
        edit.details["requests"] = rows
        edit.details["losses"] = losses
        return edit

    # -- where an edit goes --------------------------------------------------------------------

    def _site(self, tree: ModelTree) -> MLPSite:
        layers = self.layers if self.layers is not None else self.default_layers(tree)
        sites: Sequence[MLPSite]
        if self.module == "mlp_out":  # of experts the module that adds up what they return
            stack = ModelTree.of(tree.model, self.stack)
            sites = [stack.mlp_site(layer) for layer in layers]
        else:
            sites = Locator(layers, self.module, self.stack).sites(tree.model)
        if len(sites) != 1:
            raise EditError(
                f"GRACE edits one linear map, but `layers={layers}` and `module={self.module!r}` "
                f"name {len(sites)}: {', '.join(site.module_name for site in sites)}. Name one "
                "layer, and `mlp_out` where the MLP is gated."
            )
        if splits_outputs(sites[0].parameter(tree.model)):
            raise EditError(
                f"`module` is {self.module!r}, of whose outputs each process has a part of its own "
                "under tensor parallelism. Set it to `mlp_out` or `attention_out`, or divide the "
                "model by FSDP2 (`tensor_parallel_size=1`)."
            )
        return sites[0]

    def _positions(self, tree: ModelTree, batch: EditBatch) -> Tensor:
        """Column at which each request's prompt is asked, [B]."""
        if tree.is_encoder_decoder and self.stack == "decoder":
            return torch.zeros_like(batch.prompt_lengths)
        return batch.prompt_lengths - 1

    def _states(
        self, tree: ModelTree, layer: nn.Module, batch: EditBatch, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What goes into the layer and what comes out of it at the queries, [B, I] and [B, O]."""
        found: list[Tensor] = []
        at = torch.arange(len(batch), device=positions.device)

        def record(_: nn.Module, args: tuple[Tensor, ...], output: BlockOutput) -> None:
            for states in (plain(args[0]), hidden_states(output)):
                rows = states.reshape(len(batch), -1, states.shape[-1])
                found.append(rows[at, positions].float())

        with torch.no_grad(), hooked({layer: record}):
            target_nll(tree, batch)
        return found[0], found[1]

    def _place(
        self,
        entries: dict[str, MemoryEntry],
        batch: EditBatch,
        b: int,
        query: Tensor,
        value: Tensor,
    ) -> RequestFigures:
        """Finds or makes the entry that answers a request; returns what became of it."""
        request = batch.requests[b]
        label = batch.tokens.target(request.prompt, request.target_new, request.glued)
        row: RequestFigures = {"id": request.id, "placed": "added"}
        kept = {"prompt": request.prompt, "target": request.target_new, "distance": 0.0}
        radius = torch.tensor(self.radius, device=query.device)
        if entries:
            keys = self.memory.rows("keys", entries).to(query.device)
            distance, index = (found[0] for found in nearest_keys(query[None], keys))
            name = list(entries)[int(index)]
            entry = entries[name]
            old = entry.tensors["radii"].to(query.device)
            same = entry.notes["label"] == label
            nearest, own = deferral_radii(distance, old, self.radius, same_label=same)
            if own is None:
                kept["distance"] = float(distance)
                entries[name] = self._covering(entry, request.id, kept, query, nearest, distance)
                return {**row, "placed": "covered", "entry": name}
            radius = own
            if nearest is not old:
                away = [r for r, k in entry.requests.items() if k["distance"] > float(nearest)]
                row["placed"] = "split"
                if away:
                    row["dropped"] = away
                if nearest < 0:  # the very same key: it could not answer any more
                    del entries[name]
                    row["placed"] = "replaced"
                    return {**self._place(entries, batch, b, query, value), **row}
                entries[name] = replace(entry, tensors={**entry.tensors, "radii": nearest})
        name = self.entry_id(request.id, entries)
        tensors = {"keys": query, "values": value, "radii": radius}
        notes = {"label": label, "initial_radius": self.radius}
        entries[name] = MemoryEntry(tensors, {request.id: kept}, notes)
        return {**row, "entry": name}

    def _covering(
        self,
        entry: MemoryEntry,
        request_id: str,
        kept: dict[str, object],
        query: Tensor,
        radius: Tensor,
        distance: Tensor,
    ) -> MemoryEntry:
        """An entry that answers one more request."""
        requests: Mapping[str, Mapping[str, object]] = {**entry.requests, request_id: kept}
        tensors = {**entry.tensors, "radii": radius}
        if self.expansion == "moving_average" and distance > entry.tensors["radii"]:
            tensors["keys"] = 0.5 * entry.tensors["keys"] + 0.5 * query
            moved = float(distance) / 2
            requests = {  # at most, by the triangle inequality
                name: {**each, "distance": each["distance"] + moved}
                for name, each in entry.requests.items()
            } | {request_id: {**kept, "distance": moved}}
        return replace(entry, requests=requests, tensors=tensors)

    # -- what it says ----------------------------------------------------------------------------

    def _learn(
        self,
        tree: ModelTree,
        layer: nn.Module,
        batch: EditBatch,
        rows: Sequence[RequestFigures],
        entries: dict[str, MemoryEntry],
    ) -> list[list[float]]:
        """Learns the values of entries, each from one request, and adds figures to the rows.

        Returns:
            Of each request the loss before each step, and after the last.
        """
        names = [row["entry"] for row in rows]
        device = batch.input_ids.device
        start = torch.stack([entries[name].tensors["values"].to(device) for name in names])
        values = nn.Parameter(start)
        adam = Adam([values], lr=self.lr)
        positions = self._positions(tree, batch)
        steps = torch.zeros(len(batch), dtype=torch.long, device=device)
        blocks = blocks_below(tree, self._site(tree).layer)
        seen: list[list[float]] = []
        with replayed(blocks), self._answering(layer, values, positions):
            for _ in range(self.steps):
                losses = row_means(target_nll(tree, batch), batch.labels)
                seen.append(losses.tolist())
                learned = losses.detach() < self.stop_loss
                if bool(learned.all()):
                    break
                (values.grad,) = torch.autograd.grad(losses.sum(), [values])
                before = values.detach().clone()
                adam.step()
                with torch.no_grad():
                    values.copy_(torch.where(learned[:, None], before, values))
                steps += ~learned
            with torch.no_grad():
                losses = row_means(target_nll(tree, batch), batch.labels)
        seen.append(losses.tolist())
        for r, (name, row) in enumerate(zip(names, rows, strict=True)):
            value = values.detach()[r].clone()
            entry = entries[name]
            entries[name] = replace(entry, tensors={**entry.tensors, "values": value})
            row["searched_loss"] = float(losses[r])
            row["steps"] = int(steps[r])
            row["searched_p_target"] = float(torch.exp(-losses[r]))
            row["norm"] = float(torch.linalg.vector_norm(value))
        return [
            [at[r] for at in seen[: row["steps"]]] + [row["searched_loss"]]
            for r, row in enumerate(rows)
        ]

    @contextmanager
    def _answering(self, layer: nn.Module, values: Tensor, positions: Tensor) -> Iterator[None]:
        """Has the layer return values in place of its outputs, as the codebook will."""
        hits = torch.ones_like(positions, dtype=torch.bool)

        def answer(_: nn.Module, __: object, output: BlockOutput) -> BlockOutput:
            own = hidden_states(output)
            outputs = own.reshape(len(values), -1, own.shape[-1])
            replaced = replace_outputs(outputs, values, hits, positions, self.replacement)
            return with_hidden_states(output, replaced.reshape(own.shape))

        with hooked({layer: answer}):
            yield


def _waves(names: Sequence[str]) -> Iterator[list[int]]:
    """Groups of indices, in order, in each of which every name occurs once at most."""
    counts: dict[str, int] = {}
    waves: list[list[int]] = []
    for i, name in enumerate(names):
        wave = counts.get(name, 0)
        counts[name] = wave + 1
        if wave == len(waves):
            waves.append([])
        waves[wave].append(i)
    yield from waves
