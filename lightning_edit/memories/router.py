# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Which rows of a forward pass are asked anew, at which position, and which were asked before."""

# Shapes: B rows, T positions.

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_edit.core.batch import IGNORE_INDEX
from lightning_edit.core.errors import EditError
from lightning_edit.core.locator import ModelTree

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["Router", "argument_names", "bound", "stack_of"]


class Router:
    """Follows the passes of a stack of blocks, so that a memory decides once for each row.

    A row is asked when its prompt is read: at its last token, or at the first token of a decoder
    that has an encoder before it. Where a row holds a prompt and what follows it, the prompt's end
    is told by ``asked_after``, or by the pass's ``labels``: the first that counts follows it. What
    a memory decides then, its route, is kept with the cache of keys and values, and holds for all
    tokens that are generated with that cache. Beams need nothing more: those of one prompt share a
    route.

    Attributes:
        positions: Column at which each row is asked in the running pass, [B] int64; None outside
            a pass, and in one that continues rows that were asked before.
        prompt: Tokens of each row's prompt in the running pass, [B, T] bool; None as above.
        attended: Tokens of each row that are no padding in the running pass, [B, T] bool; None
            outside a pass.
        route: What was decided for each row, [B] int64; None until ``decide``.
        is_plain: Whether the running pass is one over whole rows, whose prompts nobody has told the
            ends of: it has no cache, no labels and no ``asked_after``.
    """

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.prompt: Tensor | None = None
        self.attended: Tensor | None = None
        self.route: Tensor | None = None
        self.is_plain = False
        self._is_read_whole = False  # by an encoder, which gets prompts alone
        self._lengths: Tensor | None = None  # of prompts, as the caller tells them
        self._labeled: Tensor | None = None  # the same, as the labels of a pass tell them
        self._kept: weakref.WeakKeyDictionary[Cache, Tensor] = weakref.WeakKeyDictionary()

    def follow(self, tree: ModelTree, *, begins: bool) -> list[RemovableHandle]:
        """Puts hooks around a stack.

        Args:
            tree: The stack.
            begins: Its rows are asked at their first token rather than at their last: it is a
                decoder whose prompt is read by an encoder.
        """
        stack = stack_of(tree)
        self._is_read_whole = tree.is_encoder_decoder
        names, model_names = argument_names(stack), argument_names(tree.model)

        def hear(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            labels = bound(model_names, args, kwargs).get("labels")
            self._labeled = (
                labels if isinstance(labels, Tensor) and not self._is_read_whole else None
            )

        def begin(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            self._begin(bound(names, args, kwargs), begins=begins)

        def end(_: nn.Module, args: object, kwargs: dict[str, object], output: object) -> None:
            made = _cache_in(output) if isinstance(output, Mapping) else None
            self._end(_cache_in(kwargs) if made is None else made)

        return [
            tree.model.register_forward_pre_hook(hear, with_kwargs=True),
            stack.register_forward_pre_hook(begin, with_kwargs=True),
            stack.register_forward_hook(end, with_kwargs=True),
        ]

    def decide(self, route: Tensor) -> None:
        """Settles the route of all rows of the running pass.

        Args:
            route: [B] int64; what it means is the memory's affair.
        """
        self.route = route

    @contextmanager
    def asked_after(self, lengths: Tensor) -> Iterator[None]:
        """Context manager: rows begin with prompts of so many tokens.

        For rows of prompts and answers in one, as teacher forcing has them.

        Args:
            lengths: Tokens of each prompt, without padding, [B].
        """
        before, self._lengths = self._lengths, lengths
        try:
            yield
        finally:
            self._lengths = before

    def kept(self, cache: Cache) -> Tensor | None:
        """The route of rows that a cache of keys and values holds, [B]."""
        return self._kept.get(cache)

    def keep(self, cache: Cache, route: Tensor) -> None:
        """Gives a cache that was filled by hand the route of its rows.

        Args:
            cache: Keys and values of B rows.
            route: [B], as ``kept`` returns it.
        """
        self._kept[cache] = route

    def _begin(self, given: Mapping[str, Any], *, begins: bool) -> None:
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given["inputs_embeds"]
        rows, width = tokens.shape[:2]
        cache = _cache_in(given)
        route = None if cache is None else self._kept.get(cache)
        self.positions = self.prompt = self.route = None
        columns = torch.arange(width, device=tokens.device)
        attended = torch.ones(rows, width, dtype=torch.bool, device=tokens.device)
        mask = given.get("attention_mask")
        if not begins and isinstance(mask, Tensor) and mask.ndim == 2:
            attended = mask[:, -width:].bool()
        self.attended = attended
        labels, self._labeled = self._labeled, None
        self.is_plain = False
        if cache is not None and route is not None and _is_begun(cache) and len(route) == rows:
            self.route = route
            return
        last = (attended * columns).amax(1)
        if begins:
            self.positions = columns.new_zeros(rows)
        elif self._lengths is not None:
            lengths = self._checked(rows, width).to(tokens.device)
            # The first column up to which there are so many tokens.
            self.positions = (attended.cumsum(1) >= lengths[:, None]).long().argmax(1)
        elif labels is not None and labels.shape == (rows, width):
            counts = labels != IGNORE_INDEX
            first = counts.long().argmax(1).to(tokens.device)
            is_told = counts.any(1).to(tokens.device) & (first > 0)
            self.positions = torch.where(is_told, first - 1, last)
            self.is_plain = cache is None and not bool(is_told.any())
        else:
            self.positions = last
            self.is_plain = cache is None and not self._is_read_whole
        self.prompt = attended & (columns <= self.positions[:, None])

    def _checked(self, rows: int, width: int) -> Tensor:
        """The lengths of prompts that were told, which must be those of a pass's rows."""
        lengths = torch.as_tensor(self._lengths, dtype=torch.long)
        if lengths.shape != (rows,) or bool((lengths < 1).any()) or bool((lengths > width).any()):
            raise EditError(
                f"`lengths` are the tokens of each row's prompt, {rows} of at least 1 and at most "
                f"{width} here, but got {lengths.tolist()}."
            )
        return lengths

    def _end(self, cache: Cache | None) -> None:
        if cache is not None and self.route is not None:
            self._kept[cache] = self.route
        self.positions = self.prompt = self.attended = self.route = None
        self.is_plain = False


def argument_names(module: nn.Module) -> list[str]:
    """What a module's ``forward`` takes, in order."""
    return list(inspect.signature(module.forward).parameters)


def bound(
    names: Sequence[str], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, Any]:
    """Arguments of a pass by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def stack_of(tree: ModelTree) -> nn.Module:
    """The module that runs the blocks of a stack."""
    return tree.model.get_submodule(tree.block_names[0].rsplit(".", 2)[0])


def _is_begun(cache: Cache) -> bool:
    """Whether a cache holds something of its rows."""
    try:
        return bool(cache.get_seq_length())
    except ValueError:  # a state space does not count positions
        return bool(cache.has_previous_state())


def _cache_in(values: Mapping[str, Any]) -> Cache | None:
    """The cache among a stack's arguments or results; None where there is none."""
    return values.get("cache")
