# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The passes of ``Tail`` and ``KeyPass`` through the whole model, for what cannot be run in parts.

A model that hands on the state of a convolution or of linear attention, or keeps more than one
stream between its blocks, is run as it is, on whole rows. Its own forward pass does everything; a
hook puts the change in. Rows are padded behind, where nothing that is read can see it.
"""

# Shapes: N rows, T positions, Q positions from the subject's last token on, D hidden, M inputs of
# the edited projection, V vocabulary, C outputs that change.

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_edit.core.batch import pad_rows
from lightning_edit.core.errors import ModelError
from lightning_edit.core.locator import ModelTree
from lightning_edit.passes.block_recorder import (
    BlockOutput,
    StopPass,
    entering_states,
    hidden_states,
    with_hidden_states,
)
from lightning_edit.passes.blocks import (
    explained,
    rounding_limit,
    scaled_logits,
    vocabulary_projection,
)
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.caches import keeps_keys_and_values
from lightning_edit.passes.hooks import hooked
from lightning_edit.passes.tail import ADVICE, Place, Tail

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["WholeKeys", "WholeRows", "captured", "runs_in_parts"]

LENGTH = 6  # tokens of a row that is run to see whether a model runs in parts

_IN_PARTS: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def captured(
    tree: ModelTree,
    layer: int,
    rows: Sequence[Sequence[int]],
    splits: Sequence[int],
    pad_id: int,
    place: Place = "mlp",
) -> Tail | WholeRows:
    """Rows to be run again with a change of a layer: in parts where the model allows it.

    Args:
        tree: A decoder-only model.
        layer: The layer whose output changes.
        rows: Token ids of N rows.
        splits: Index of the subject's last token in each row.
        pad_id: Fills the gaps.
        place: What changes there, as in ``Tail.capture``.

    Raises:
        ModelError: If the model cannot be run so at all.
    """
    if _IN_PARTS.get(tree.model, True) and keeps_keys_and_values(tree.model):
        try:
            tail = Tail.capture(tree, layer, rows, splits, pad_id, place)
        except ModelError as reason:
            try:
                whole = WholeRows.capture(tree, layer, rows, splits, pad_id, place)
            except ModelError:
                raise reason from None
            _IN_PARTS[tree.model] = False
            return whole
        _IN_PARTS[tree.model] = True
        return tail
    return WholeRows.capture(tree, layer, rows, splits, pad_id, place)


def runs_in_parts(tree: ModelTree, layer: int) -> bool:
    """Whether a model's blocks can be run on their own, which is tried once for a model.

    Args:
        tree: A decoder-only model.
        layer: A layer that is edited.
    """
    if tree.model not in _IN_PARTS:
        size = getattr(tree.input_embeddings, "num_embeddings", LENGTH)
        row = [(size // 3 + i) % size for i in range(LENGTH)]
        try:
            captured(tree, layer, [row], [LENGTH // 2], row[0])
        except ModelError:
            return True  # what does not run at all is told where it is needed
    return _IN_PARTS.get(tree.model, False) and keeps_keys_and_values(tree.model)


@dataclass(frozen=True)
class WholeRows:
    """A batch of rows, ready to be run again as a whole with a change at one position of each.

    Built by ``capture``; does what ``Tail`` does.

    Args:
        tree: Where the model's parts are.
        layer: The edited layer.
        ids: Token ids, [N, T].
        mask: 1 where they are no padding, [N, T].
        splits: Position of the change in each row, [N].
        keys: Input of the edited projection there, [N, M].
        values: What changes there, as it was, [N, C, D].
        place: What changes, as in ``Tail.capture``.
        dtype: Precision of the matrix products if lower than the model's.
    """

    tree: ModelTree
    layer: int
    ids: Tensor
    mask: Tensor
    splits: Tensor
    keys: Tensor
    values: Tensor
    place: Place
    dtype: torch.dtype | None = None

    @classmethod
    def capture(
        cls,
        tree: ModelTree,
        layer: int,
        rows: Sequence[Sequence[int]],
        splits: Sequence[int],
        pad_id: int,
        place: Place = "mlp",
    ) -> WholeRows:
        """Runs the rows once, and one of them by itself for comparison.

        Args:
            tree: A decoder-only model.
            layer: The layer whose output changes.
            rows: Token ids of N rows.
            splits: Index of the subject's last token in each row.
            pad_id: Fills the gaps.
            place: What changes, as in ``Tail.capture``.

        Raises:
            ModelError: If the model does not give in a batch what it gives alone.
        """
        model: PreTrainedModel = tree.model
        device = next(tree.blocks[0].parameters()).device
        ids, mask = (part.to(device) for part in pad_rows(rows, pad_id))
        at, layer = torch.tensor(splits, device=device), tree.index(layer)
        empty = torch.empty(0)
        batch = cls(tree, layer, ids, mask, at, empty, empty, place)
        name = type(model).__name__
        with torch.no_grad(), borrowed(model), explained(f"{name} cannot be run on rows", ADVICE):
            site = tree.mlp_site(layer)
            key = site.module(model)
            seen: dict[object, Tensor] = {}

            def enter(_: nn.Module, args: tuple[Tensor, ...], __: object) -> None:
                seen["key"] = site.keys(model, _at(args[0], at))

            def leave(module: nn.Module, _: object, output: BlockOutput) -> None:
                seen[module] = _at(hidden_states(output), at)

            parts = batch._parts()
            with hooked(dict.fromkeys(parts, leave), {key: enter}):
                batch._final()
            values = torch.stack([seen[part] for part in parts], 1)
            batch = replace(batch, keys=seen["key"], values=values)
            error = batch._difference()
        if not error < rounding_limit(values.dtype, device):
            raise ModelError(
                f"{name}, run on a batch of rows, gives logits that differ by {error:.0%} from "
                "those of a row by itself: rows see their padding, or it does something else after "
                f"its projection to the vocabulary. {ADVICE}"
            )
        return batch

    def hidden(self, change: Tensor) -> Tensor:
        """What enters the projection to the vocabulary, with a change of what was captured.

        Args:
            change: Added to ``values``, [N, C, D].

        Returns:
            [N, Q, D], from the changed position on.
        """
        changes = zip(self._parts(), change.unbind(1), strict=True)
        adders = {part: _adder(added, self.splits) for part, added in changes}
        with self._precision(), hooked(adders):
            state = self._final()
        width = int((self.mask.sum(1) - self.splits).max())
        columns = self.splits[:, None] + torch.arange(width, device=state.device)
        columns = columns.clamp_max(state.shape[1] - 1)
        return state.gather(1, columns[..., None].expand(-1, -1, state.shape[-1]))

    def logits(self, state: Tensor) -> Tensor:
        """Next-token logits of hidden states [..., D], as float32 [..., V]."""
        with self._precision():
            logits: Tensor = vocabulary_projection(self.tree)(state)
        return scaled_logits(self.tree.model, logits)

    def lower(self, dtype: torch.dtype) -> WholeRows:
        """The same rows with matrix products in a lower precision, by autocast."""
        return replace(self, dtype=dtype)

    def select(self, rows: Tensor) -> WholeRows:
        """Some of the rows, [n] int64."""
        return replace(
            self,
            ids=self.ids[rows],
            mask=self.mask[rows],
            splits=self.splits[rows],
            keys=self.keys[rows],
            values=self.values[rows],
        )

    def _precision(self) -> torch.autocast:
        on = self.dtype is not None
        return torch.autocast(self.keys.device.type, dtype=self.dtype, enabled=on)

    def _parts(self) -> list[nn.Module]:
        """The modules whose outputs change."""
        if self.place == "block":
            return [self.tree.blocks[self.layer]]
        parts = [self.tree.mlp(self.layer)]
        if self.place == "sublayers":
            parts.append(self.tree.attention_out(self.layer).module(self.tree.model))
        return parts

    def _final(self) -> Tensor:
        """What enters the projection to the vocabulary, [N, T, D]."""
        found: list[Tensor] = []

        def take(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            found.append(entering_states(args, kwargs))
            raise StopPass

        head = vocabulary_projection(self.tree)
        with hooked(before={head: take}), suppress(StopPass):
            self.tree.model(input_ids=self.ids, attention_mask=self.mask, use_cache=False)
        return found[0]

    def _difference(self) -> float:
        """Relative difference of a row's logits from those that the model gives it alone."""
        n = int(self.mask.sum(1).argmin())  # the one with most padding
        length, split = int(self.mask[n].sum()), int(self.splits[n])
        state = self.hidden(torch.zeros_like(self.values))
        found = self.logits(state[n, : length - split])
        row = self.ids[n : n + 1, :length]
        own = self.tree.model(input_ids=row, use_cache=False).logits[0, split:].float()
        if not bool(own.isfinite().all()):
            return 0.0  # of such a model the losses tell, which name the request
        return float((found - own).norm() / own.norm())


@dataclass(frozen=True)
class WholeKeys:
    """Rows that end at the subject's last token, run as a whole for the keys of each layer.

    Built by ``capture``; does what ``KeyPass`` does.

    Args:
        tree: Where the model's parts are.
        layers: Edited layers, in order.
        ids: Token ids, [N, T].
        mask: 1 where they are no padding, [N, T].
        state: What enters the first edited block, [..., T, D].
        place: What is asked of the last edited layer: its ``block``'s output, or its MLP's.
    """

    tree: ModelTree
    layers: list[int]
    ids: Tensor
    mask: Tensor
    state: Tensor
    place: Place

    @classmethod
    @torch.no_grad()
    def capture(
        cls,
        tree: ModelTree,
        layers: Sequence[int],
        rows: Sequence[Sequence[int]],
        pad_id: int,
        place: Place = "block",
    ) -> WholeKeys:
        """Runs the rows once up to the first edited layer.

        Args:
            tree: A decoder-only model.
            layers: Edited layers.
            rows: Token ids of N rows, each cut after the subject's last token.
            pad_id: Fills the gaps.
            place: What takes target values at the last edited layer.
        """
        device = next(tree.blocks[0].parameters()).device
        ids, mask = (part.to(device) for part in pad_rows(rows, pad_id))
        named = sorted({tree.index(layer) for layer in layers})
        keys = cls(tree, named, ids, mask, torch.empty(0), place)
        found: list[Tensor] = []

        def take(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            found.append(entering_states(args, kwargs))
            raise StopPass

        keys._run({}, {tree.blocks[named[0]]: take})
        return replace(keys, state=found[0])

    @torch.no_grad()
    def keys(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys of a layer, and what the last edited layer makes of the rows.

        Args:
            layer: An edited layer; weights of those before may have changed.

        Returns:
            Input of its edited projection at the subject's last token, [N, M], and what takes
            target values at the last edited layer there, [N, D]; both float32.
        """
        model, end = self.tree.model, self.mask.sum(1) - 1
        site = self.tree.mlp_site(layer)
        asked, last = (self.tree.mlp_site(i).module(model) for i in (layer, self.layers[-1]))
        block = self.tree.blocks[self.layers[-1]]
        is_block = self.place == "block"
        seen: dict[str, Tensor] = {}

        def take_key(_: nn.Module, args: tuple[Tensor, ...], __: object) -> None:
            seen["key"] = site.keys(model, _at(args[0], end)).float()

        def take_output(_: nn.Module, __: object, output: BlockOutput) -> None:
            seen["output"] = _at(hidden_states(output), end).float()

        def leave(_: nn.Module, __: object, output: BlockOutput) -> None:
            if is_block:
                take_output(_, __, output)
            raise StopPass

        after: dict[nn.Module, Callable[..., object]] = {block: leave}
        if not is_block:
            after[last] = take_output
        self._run(after, {asked: take_key})
        return seen["key"], seen["output"]

    def _run(
        self,
        after: dict[nn.Module, Callable[..., object]],
        before: dict[nn.Module, Callable[..., object]],
    ) -> None:
        model: PreTrainedModel = self.tree.model
        with hooked(after, before), suppress(StopPass):
            model.base_model(input_ids=self.ids, attention_mask=self.mask, use_cache=False)


def _at(states: Tensor, columns: Tensor) -> Tensor:
    """States of a position of each row, [N, ·]; some models flatten rows and positions."""
    rows = _by_row(states, len(columns))
    return rows[torch.arange(len(columns), device=rows.device), columns].clone()


def _by_row(states: Tensor, count: int) -> Tensor:
    if states.ndim > 3 or (states.ndim == 3 and states.shape[0] not in (1, count)):
        raise ModelError(
            f"A layer returns states of shape {list(states.shape)} for {count} rows: more than one "
            "stream of hidden states. Choose a method that edits at the MLP's output, such as ROME."
        )
    return states.reshape(count, -1, states.shape[-1])


def _adder(change: Tensor, columns: Tensor) -> Callable[..., BlockOutput]:
    """A hook that adds a change to a module's output at a column of each row."""

    def add(_: nn.Module, __: object, output: BlockOutput) -> BlockOutput:
        whole = hidden_states(output)
        rows = _by_row(whole, len(columns))
        at = torch.arange(rows.shape[1], device=rows.device) == columns[:, None]
        moved = torch.where(at[..., None], rows + change[:, None].to(rows.dtype), rows)
        return with_hidden_states(output, moved.reshape(whole.shape))

    return add
