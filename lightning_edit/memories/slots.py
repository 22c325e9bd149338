# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Blocks of slots beside MLPs, each trained for a set of facts."""

# Shapes: N blocks, L layers, M maps of the hidden state (one, or two where slots are gated),
# S slots of a block, D hidden.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_edit.core.errors import EditError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.side_memory import EditMemory, MemoryEntry
from lightning_edit.memories.beside import beside_mlp

__all__ = ["CalibrationSlots", "slot_output"]

Activation = Callable[[Tensor], Tensor]


def slot_output(
    states: Tensor, keys: Tensor, values: Tensor, activation: Activation = torch.relu
) -> Tensor:
    """What slots add to an MLP's output: a(h Kᵀ) V, or (a(h Gᵀ) ⊙ h Kᵀ) V where they are gated.

    Args:
        states: Inputs h of the MLP, [..., D].
        keys: K, [1, S, D]; where slots are gated G and K, [2, S, D].
        values: V, [S, D].
        activation: a.

    Returns:
        [..., D] float32; with ReLU exactly zero where no slot fires.

    References:
        Calibrating Factual Knowledge in Pretrained Language Models, arXiv 2210.03329, section 3.1.

    Examples:
        >>> h, keys = torch.tensor([[1.0], [-1.0]]), torch.tensor([[[2.0]]])
        >>> slot_output(h, keys, torch.tensor([[3.0]])).tolist()
        [[6.0], [0.0]]
    """
    states = states.float()
    first, *others = (states @ part.T for part in keys)
    fired = activation(first)
    for other in others:
        fired = fired * other
    return fired @ values


class CalibrationSlots(EditMemory):
    """The slots of CaliNET (arXiv 2210.03329): one entry is a block that was trained as a whole.

    They read the MLP's input at every token, prompts and generated ones alike. Where none fires,
    and while all values are zero, the MLP's output keeps its bits.

    The requests of a block share its slots, so ``without`` can take them out together only.

    Its buffers are ``keys`` [N, L, M, S, D] and ``values`` [N, L, S, D], float32.

    Args:
        layers: The blocks of the model whose MLPs have slots.
        slots: Slots of a block of them at each layer, S.
        gated: Whether slots have a gate, M = 2.
        activation: Name of the activation function a, as transformers knows it.
    """

    fields: ClassVar[tuple[str, ...]] = ("keys", "values")
    keys: Tensor
    values: Tensor

    def __init__(
        self,
        layers: Sequence[int],
        slots: int = 64,
        gated: bool = False,
        activation: str = "relu",
    ) -> None:
        super().__init__(layers=list(layers), slots=slots, gated=gated, activation=activation)
        # The slots of all blocks in one, [L, M, N · S, D] and [L, N · S, D]: no part of the state.
        self.register_buffer("joint_keys", torch.zeros(0), persistent=False)
        self.register_buffer("joint_values", torch.zeros(0), persistent=False)

    @property
    def activation(self) -> Activation:
        """The activation function a."""
        from transformers.activations import ACT2FN

        return cast(Activation, ACT2FN[self.settings["activation"]])

    @override
    def narrowed(self, entry: MemoryEntry) -> MemoryEntry:
        """Refuses: slots of a block were trained for all its requests together."""
        others = ", ".join(repr(request) for request in list(entry.requests)[:5])
        more = ", …" if len(entry.requests) > 5 else ""
        raise EditError(
            f"The slots of these edits were trained together with those of {others}{more}, and "
            "cannot be taken apart. Have the editor forget them (`editor.remove(ids)`), which "
            "trains slots anew for the others, or take out all of them together."
        )

    def add_slots(
        self, model: nn.Module, slots: Sequence[tuple[Tensor, Tensor]]
    ) -> list[RemovableHandle]:
        """Hooks that put slots beside the MLPs of a model, on top of any others.

        Args:
            model: The model.
            slots: Keys [M, S, D] and values [S, D] for each layer; S may be any number.
        """
        tree, handles = ModelTree.of(model), list[RemovableHandle]()
        activation = self.activation
        for layer, (keys, values) in zip(self.settings["layers"], slots, strict=True):

            def add(states: Tensor, keys: Tensor = keys, values: Tensor = values) -> Tensor:
                return slot_output(states, keys, values, activation)

            handles += beside_mlp(tree, layer, add)
        return handles

    @override
    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        tree, handles = ModelTree.of(model), list[RemovableHandle]()
        for i, layer in enumerate(self.settings["layers"]):

            def add(states: Tensor, i: int = i) -> Tensor | None:
                if self.is_off:
                    return None
                keys, values = self.joint_keys[i], self.joint_values[i]
                more = slot_output(states, keys, values, self.activation)
                return more if bool(more.any()) else None

            handles += beside_mlp(tree, layer, add)
        return handles

    @override
    def derive(self) -> None:
        if len(self):  # [N, L, M, S, D] to [L, M, N · S, D]
            self.joint_keys = self.keys.permute(1, 2, 0, 3, 4).flatten(2, 3).contiguous()
            self.joint_values = self.values.transpose(0, 1).flatten(1, 2).contiguous()
        else:
            self.joint_keys = self.joint_values = torch.zeros(0, device=self._device())
