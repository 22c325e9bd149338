# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Passes over the same tokens that run only what has changed: the upper blocks of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lightning_edit.core.locator import ModelTree
from lightning_edit.passes.blocks import running

__all__ = ["blocks_before", "blocks_below", "replayed"]


def blocks_below(tree: ModelTree, layer: int) -> list[nn.Module]:
    """The blocks that run before a block and do not depend on it.

    Args:
        tree: The stack that the block is in.
        layer: Index of the block.

    Returns:
        Blocks of the stack; for a decoder with an encoder, those of the encoder, too.
    """
    below = tree.blocks[: tree.index(layer)]
    if not tree.is_encoder_decoder:
        return below
    encoder = ModelTree.of(tree.model, "encoder")
    return below if encoder.block_names == tree.block_names else [*encoder.blocks, *below]


def blocks_before(tree: ModelTree, names: Sequence[str]) -> list[nn.Module]:
    """The blocks that run before some parameters, and depend on none of them.

    Args:
        tree: The stack that the parameters are in; where one is elsewhere, there is no such block.
        names: Names of the parameters.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> tree = ModelTree.of(tiny_model())
        >>> names = [name for name, _ in tree.model.named_parameters()]
        >>> len(blocks_before(tree, [name for name in names if ".layers.2." in name]))
        2
        >>> blocks_before(tree, names)
        []
    """
    beginnings = [f"{name}." for name in tree.block_names]
    first = len(beginnings)
    for name in names:
        at = (i for i, beginning in enumerate(beginnings) if name.startswith(beginning))
        first = min(first, next(at, 0))
    return blocks_below(tree, first) if 0 < first < len(beginnings) else []


@contextmanager
def replayed(
    blocks: list[nn.Module], outputs: dict[nn.Module, object] | None = None
) -> Iterator[None]:
    """Context manager: blocks run once, and from then on return what they returned.

    All passes inside must be over the same tokens. What the model does around its blocks, it does
    itself, in every pass.

    Args:
        blocks: Blocks that nothing inside the context changes.
        outputs: What they returned in an earlier context over the same tokens; what they
            return here is put into it.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> with replayed([layer]):
        ...     first = layer(torch.zeros(1, 2))
        ...     layer(torch.ones(1, 2)) is first
        True
        >>> layer(torch.zeros(1, 2)) is first
        False
    """
    kept: dict[nn.Module, object] = {} if outputs is None else outputs

    def once(block: nn.Module, forward: Callable[..., object]) -> Callable[..., object]:
        def recall(*args: object, **kwargs: object) -> object:
            if block not in kept:
                kept[block] = forward(*args, **kwargs)
            return kept[block]

        return recall

    with running({block: once(block, block.forward) for block in blocks}):
        yield
