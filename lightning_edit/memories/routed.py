# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Memories beside one layer that decide once for each prompt who answers it."""

# Shapes: B rows.

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_edit.core.locator import ModelTree, StackKind
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.memories.router import Router
from lightning_edit.passes.block_recorder import BlockOutput, hidden_states, with_hidden_states

__all__ = ["LayerMemory"]


class LayerMemory(EditMemory):
    """Base of memories beside one linear layer that decide once for each prompt who answers it.

    A subclass writes ``answer``, which lets the router decide and acts by its route.

    Args:
        module: Name of the linear layer in the model.
        stack: The stack that the layer is in.
        settings: Further arguments of the subclass, as JSON types.
    """

    def __init__(self, module: str, stack: StackKind, **settings: object) -> None:
        super().__init__(module=module, stack=stack, **settings)
        self.router: Router = Router()

    @abstractmethod
    def answer(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """What the layer returns in place of its output; None for the output itself."""

    @override
    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        stack: StackKind = self.settings["stack"]
        tree = ModelTree.of(model, stack)
        layer = model.get_submodule(self.settings["module"])
        begins = tree.is_encoder_decoder and stack == "decoder"
        return [
            *self.router.follow(tree, begins=begins),
            layer.register_forward_hook(self._answered),
        ]

    def _answered(
        self, layer: nn.Module, args: tuple[Tensor, ...], output: BlockOutput
    ) -> BlockOutput | None:
        found = self.answer(layer, args, hidden_states(output))
        return None if found is None else with_hidden_states(output, found)
