# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What goes through the blocks of a model, and passes that end once it is known."""

# Shapes: N rows, T positions, D hidden.

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_edit.passes.hooks import hooked

__all__ = [
    "Arguments",
    "BlockOutput",
    "BlockRecord",
    "StopPass",
    "entering_states",
    "hidden_states",
    "recorded_blocks",
    "with_hidden_states",
]

#: Positional and named arguments of a block.
Arguments = tuple[tuple[object, ...], dict[str, object]]
#: What a block returns: the hidden states, and in some models more behind them.
BlockOutput = Tensor | tuple[Tensor, *tuple[object, ...]]


class StopPass(Exception):  # noqa: N818  # control flow, not an error
    """Ends a forward pass where nothing more of it is needed."""


@dataclass
class BlockRecord:
    """What went through blocks.

    Args:
        states: Index to the hidden states that enter a block, [N, T, D]; after the last block,
            those that leave it.
        arguments: Index to the further arguments of a block.
    """

    states: dict[int, Tensor] = field(default_factory=dict)
    arguments: dict[int, Arguments] = field(default_factory=dict)


@contextmanager
def recorded_blocks(
    blocks: Sequence[nn.Module],
    first: int = 0,
    last: int | None = None,
    *,
    keep: Collection[int] | None = None,
    stops: bool = False,
) -> Iterator[BlockRecord]:
    """Context manager: records what enters some blocks, and what leaves the last of them.

    Args:
        blocks: All blocks of a stack.
        first: Index of the first block that is recorded.
        last: Index of the last one; that of the stack when None.
        keep: Indices whose hidden states are kept; all when None.
        stops: End the pass at the last one, which is not run.

    Examples:
        >>> import torch
        >>> from lightning_edit.core.locator import ModelTree
        >>> from lightning_edit.demos import tiny_model
        >>> model = tiny_model()
        >>> with recorded_blocks(ModelTree.of(model).blocks, 1, 2, stops=True) as seen:
        ...     model(input_ids=torch.tensor([[5, 6, 7]]))
        >>> sorted(seen.arguments), tuple(seen.states[1].shape)
        ([1, 2], (1, 3, 32))
    """
    end = len(blocks) - 1 if last is None else last
    kept = range(len(blocks) + 1) if keep is None else keep
    seen = BlockRecord()

    def enter(i: int) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            state = entering_states(args, kwargs)
            if i in kept:
                seen.states[i] = state
            further = {k: v for k, v in kwargs.items() if args or k != "hidden_states"}
            seen.arguments[i] = (tuple(args[1:]), further)
            if stops and i == end:
                raise StopPass

        return record

    def leave(_: nn.Module, __: object, output: BlockOutput) -> None:
        if end + 1 in kept:
            seen.states[end + 1] = hidden_states(output)

    before = {blocks[i]: enter(i) for i in range(first, end + 1)}
    with hooked({blocks[end]: leave}, before), suppress(*[StopPass] if stops else []):
        yield seen


def entering_states(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among what a block is called with: the first argument, or a named one."""
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def hidden_states(output: BlockOutput) -> Tensor:
    """A block's hidden states: some blocks return a tuple around them."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden_states(output: BlockOutput, states: Tensor) -> BlockOutput:
    """What a block returns, with other hidden states in it."""
    return (states, *output[1:]) if isinstance(output, tuple) else states
