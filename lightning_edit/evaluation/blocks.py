# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What running a model's blocks by themselves takes, however its authors wrote them."""

# Shapes: N rows, T positions, D hidden.

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_edit.core.errors import ModelError

__all__ = [
    "Arguments",
    "BlockRecorder",
    "Prefix",
    "StopPass",
    "explained",
    "hidden_states",
    "running",
    "scaled_logits",
    "with_cache",
]

#: What a block is called with behind the hidden states.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class StopPass(Exception):  # noqa: N818  # control flow, not an error
    """Ends a forward pass where nothing more of it is needed."""


class BlockRecorder:
    """Records what enters some blocks inside a ``with`` block, and what leaves the last of them.

    Args:
        blocks: All blocks of a stack.
        first: Index of the first block that is recorded.
        last: Index of the last one; that of the stack when None.
        keep: Indices whose hidden states are kept; all when None.
        stops: End the pass at the last one, which is not run.

    Example:
        >>> from lightning_edit.core.locator import ModelTree
        >>> from lightning_edit.demos import tiny_model
        >>> model = tiny_model()
        >>> with BlockRecorder(ModelTree.of(model).blocks, 1, 2, stops=True) as seen:
        ...     model(input_ids=torch.tensor([[5, 6, 7]]))
        >>> sorted(seen.arguments), tuple(seen.states[1].shape)
        ([1, 2], (1, 3, 32))
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        first: int = 0,
        last: int | None = None,
        *,
        keep: Collection[int] | None = None,
        stops: bool = False,
    ) -> None:
        self._blocks = blocks
        self._first, self._last = first, len(blocks) - 1 if last is None else last
        self._keep = range(len(blocks) + 1) if keep is None else keep
        self._stops = stops
        self._hooks: list[Any] = []
        #: Index to the hidden states that enter a block, [N, T, D]; behind the last block, those
        #: that leave it.
        self.states: dict[int, Tensor] = {}
        #: Index to the further arguments of a block.
        self.arguments: dict[int, Arguments] = {}

    def __enter__(self) -> Self:
        for i in range(self._first, self._last + 1):
            enter = self._enter(i)
            self._hooks.append(self._blocks[i].register_forward_pre_hook(enter, with_kwargs=True))
        self._hooks.append(self._blocks[self._last].register_forward_hook(self._leave))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        for hook in self._hooks:
            hook.remove()
        return kind is StopPass and self._stops

    def _enter(self, i: int) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            state = args[0] if args else kwargs.pop("hidden_states")
            if i in self._keep:
                self.states[i] = state
            self.arguments[i] = (tuple(args[1:]), kwargs)
            if self._stops and i == self._last:
                raise StopPass

        return record

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._last + 1 in self._keep:
            self.states[self._last + 1] = hidden_states(output)


class Prefix:
    """Keys and values of the positions before, to be read by attention and never added to.

    Args:
        layers: Index of a layer to its keys and values, [N, heads, positions, width of a head].
            Where attention has several times as many rows, each of these N goes to every set.
    """

    is_compileable = False

    def __init__(self, layers: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        self.layers = dict(layers)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """The prefix's keys and values with the new ones behind them."""
        if layer_idx not in self.layers:
            return key, value
        keys, values = self.layers[layer_idx]
        sets = key.shape[0] // keys.shape[0]
        if sets > 1:
            keys, values = (part.repeat(sets, 1, 1, 1) for part in (keys, values))
        return torch.cat([keys, key], dim=-2), torch.cat([values, value], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions in the prefix."""
        return self.layers[layer_idx][0].shape[-2] if layer_idx in self.layers else 0

    def select(self, rows: Tensor) -> Prefix:
        """The prefixes of some of the rows."""
        return Prefix({i: (k[rows], v[rows]) for i, (k, v) in self.layers.items()})


@contextmanager
def explained(problem: str, advice: str) -> Iterator[None]:
    """Turns what a model of another make stumbles over into an error that says so.

    Args:
        problem: What then cannot be done, such as ``The blocks of GPT2LMHeadModel cannot be run on
            their own``.
        advice: What to do instead.

    Raises:
        ModelError: In place of errors that come from the model's code.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as reason:
        if isinstance(reason, torch.OutOfMemoryError):
            raise
        raise ModelError(f"{problem} ({type(reason).__name__}: {reason}). {advice}") from reason


@contextmanager
def running(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Has modules run something else in place of their ``forward`` inside a ``with`` block."""
    # Other packages put a method of their own into the instance.
    kept = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in kept.items():
            if own is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own


def hidden_states(output: Any) -> Tensor:
    """A block's hidden states: some blocks return a tuple around them."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def with_cache(
    args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with another cache of keys and values, in a new dict."""
    from transformers import Cache

    def swap(value: Any) -> Any:
        return cache if isinstance(value, Cache) else value

    return tuple(swap(a) for a in args), {name: swap(v) for name, v in kwargs.items()}


def scaled_logits(model: Any, logits: Tensor) -> Tensor:
    """What a model does to the output of its projection to the vocabulary, by its configuration.

    Args:
        model: A Hugging Face language model.
        logits: The projection's output, [..., V].

    Returns:
        Logits scaled and capped, [..., V] float32.
    """
    logits = logits.float()
    config = getattr(model, "config", None)
    for name, power in (("logit_scale", 1), ("logits_scaling", -1)):
        logits = logits * (getattr(config, name, None) or 1.0) ** power
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
