# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What goes through the blocks of a model, and passes that end once it is known."""

# Shapes: N rows, T positions, D hidden.

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

from torch import Tensor, nn

__all__ = ["Arguments", "BlockRecorder", "StopPass", "hidden_states"]

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

    Examples:
        >>> import torch
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


def hidden_states(output: Any) -> Tensor:
    """A block's hidden states: some blocks return a tuple around them."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
