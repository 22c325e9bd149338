# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Keys of several layers while these are edited one after another."""

# Shapes: N rows, E requests, T positions up to the subject's last token or templates, D hidden, M
# inputs of the edited projection.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_edit.core.batch import pad_rows
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.sharding import ends_whole, plain
from lightning_edit.passes.attention import quick_attention
from lightning_edit.passes.block_recorder import (
    Arguments,
    BlockOutput,
    hidden_states,
    recorded_blocks,
)
from lightning_edit.passes.hooks import hooked
from lightning_edit.passes.tail import Place
from lightning_edit.passes.transfers import sent
from lightning_edit.passes.whole_rows import WholeKeys, runs_in_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KeyPass", "KeyPasses", "key_pass_of"]

MAX_ROWS = 512  # rows whose keys are taken at once


@dataclass
class KeyPass:
    """Rows that end at the subject's last token, ready to run between the edited layers.

    What lies below the first edited layer is run once. An edit of a layer changes every position
    above it, so ``keys`` runs on from the last layer that was passed.

    Args:
        tree: Where the model's parts are.
        layers: Edited layers, in order.
        state: Residual stream that enters the block ``at``, [N, T, D].
        at: The block that is run next.
        calls: Further arguments of each block from the first to the last edited layer.
        place: What is asked of the last edited layer: its ``block``'s output, or its MLP's.
    """

    tree: ModelTree
    layers: list[int]
    state: Tensor
    at: int
    calls: dict[int, Arguments]
    place: Place = "block"

    @classmethod
    @torch.no_grad()
    def capture(
        cls,
        tree: ModelTree,
        layers: Sequence[int],
        rows: Sequence[Sequence[int]],
        pad_id: int,
        place: Place = "block",
    ) -> KeyPass:
        """Runs the rows once up to the last edited layer.

        Args:
            tree: A decoder-only model.
            layers: Edited layers.
            rows: Token ids of N rows, each cut after the subject's last token.
            pad_id: Fills the gaps on the left.
            place: What takes target values at the last edited layer.
        """
        layers = sorted({tree.index(layer) for layer in layers})
        model: PreTrainedModel = tree.model
        device = next(tree.blocks[0].parameters()).device
        ids, mask = (sent(part, device) for part in pad_rows(rows, pad_id, side="left"))
        first, last = layers[0], layers[-1]
        recorded = recorded_blocks(tree.blocks, first, last, keep=[first], stops=True)
        dtype = next(tree.blocks[0].parameters()).dtype
        with ends_whole(model), quick_attention(device, dtype), recorded as seen:
            model.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp_min(0),
                use_cache=False,
            )
        return cls(tree, list(layers), seen.states[first], first, seen.arguments, place)

    @torch.no_grad()
    def keys(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys of a layer, and what the last edited layer makes of the rows.

        Layers are asked in order; weights of those before may have changed since.

        Args:
            layer: An edited layer.

        Returns:
            Input of its edited projection at the subject's last token, [N, M], and what takes
            target values at the last edited layer there, [N, D]; both float32.
        """
        for i in range(self.at, layer):
            self.state = self._block(i, self.state)
        self.at = layer
        model, site = self.tree.model, self.tree.mlp_site(layer)
        asked, last = (self.tree.mlp_site(i).module(model) for i in (layer, self.last))
        seen: dict[str, Tensor] = {}

        def at_end(states: Tensor) -> Tensor:
            # Some models flatten batch and positions before the MLP.
            rows = states.reshape(self.state.shape[0], -1, states.shape[-1])
            return rows[:, -1].clone()

        def take_key(_: nn.Module, args: tuple[Tensor, ...], __: object) -> None:
            seen["key"] = site.keys(model, at_end(plain(args[0]))).float()

        def take_output(_: nn.Module, __: object, output: BlockOutput) -> None:
            seen["output"] = at_end(hidden_states(output)).float()

        state = self.state
        with hooked({last: take_output}, {asked: take_key}):
            for i in range(layer, self.last + 1):
                state = self._block(i, state)
        return seen["key"], state[:, -1].float() if self.place == "block" else seen["output"]

    @property
    def last(self) -> int:
        """The last edited layer."""
        return self.layers[-1]

    def _block(self, i: int, state: Tensor) -> Tensor:
        args, kwargs = self.calls[i]
        with quick_attention(state.device, state.dtype):
            return hidden_states(self.tree.blocks[i](state, *args, **kwargs))


def key_pass_of(tree: ModelTree, layer: int) -> type[KeyPass] | type[WholeKeys]:
    """How keys are taken from a model: block by block, or of whole rows where it has to be.

    Args:
        tree: A decoder-only model.
        layer: A layer that is edited.
    """
    return KeyPass if runs_in_parts(tree, layer) else WholeKeys


@dataclass
class KeyPasses:
    """Rows of requests in templates, few enough at a time for their attention to fit in memory.

    Args:
        parts: The passes of the rows, in order.
        templates: Rows of each request.
    """

    parts: Sequence[KeyPass | WholeKeys]
    templates: int

    @classmethod
    def capture(
        cls,
        tree: ModelTree,
        layers: Sequence[int],
        rows: Sequence[Sequence[Sequence[int]]],
        pad_id: int,
        place: Place = "block",
    ) -> KeyPasses:
        """Runs the rows once up to the last edited layer.

        Args:
            tree: A decoder-only model.
            layers: Edited layers.
            rows: Token ids of E requests in T templates each, cut after the subject's last token.
            pad_id: Fills the gaps on the left.
            place: What takes target values at the last edited layer.
        """
        flat = [row for request in rows for row in request]
        starts = range(0, len(flat), MAX_ROWS)
        take = key_pass_of(tree, layers[-1])
        parts = [
            take.capture(tree, layers, flat[start : start + MAX_ROWS], pad_id, place)
            for start in starts
        ]
        return cls(parts, len(rows[0]))

    def keys(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys of a layer, [E, T, M], and what the last edited layer makes of the rows, [E, T, D].

        Layers are asked in order; weights of those before may have changed since.

        Args:
            layer: An edited layer.
        """
        keys, outputs = zip(*(part.keys(layer) for part in self.parts), strict=True)
        key, output = torch.cat(keys), torch.cat(outputs)
        return (
            key.reshape(-1, self.templates, key.shape[-1]),
            output.reshape(-1, self.templates, output.shape[-1]),
        )
