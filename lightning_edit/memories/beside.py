# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What stands beside an MLP: it reads the same inputs and adds to the outputs."""

# Shapes: D hidden.

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_edit.core.locator import ModelTree
from lightning_edit.core.sharding import plain

__all__ = ["beside_mlp"]


def beside_mlp(
    tree: ModelTree, layer: int, add: Callable[[Tensor], Tensor | None]
) -> list[RemovableHandle]:
    """Hooks that add to an MLP's output what a function makes of its input.

    Args:
        tree: The stack of blocks.
        layer: The block whose MLP it is.
        add: Takes the MLP's inputs, [..., D], and returns what is added to its outputs, or None.
    """
    inputs: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[:] = [plain(args[0])]

    def give(_: nn.Module, __: object, output: Tensor) -> Tensor | None:
        more = add(inputs.pop()) if inputs else None
        return None if more is None else output + more.to(output.dtype)

    first = tree.mlp_in(layer)[0].module(tree.model)
    last = tree.mlp_out(layer).module(tree.model)
    return [first.register_forward_pre_hook(take), last.register_forward_hook(give)]
