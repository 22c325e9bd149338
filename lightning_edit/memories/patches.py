# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Neurons beside an MLP, each of which corrects one token."""

# Shapes: N neurons, D hidden, B rows, T positions.

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_edit.core.locator import ModelTree
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.memories.beside import beside_mlp

__all__ = ["PatchNeurons", "patch_output"]


def patch_output(states: Tensor, keys: Tensor, biases: Tensor, values: Tensor) -> Tensor:
    """What neurons add to an MLP's output: relu(x Kᵀ + b) V.

    Args:
        states: Inputs of the MLP, [..., D].
        keys: K, [N, D].
        biases: b, [N].
        values: V, [N, D].

    Returns:
        [..., D] float32; exactly zero where no neuron fires.

    Examples:
        >>> x, key = torch.tensor([[1.0], [-1.0]]), torch.ones(1, 1)
        >>> patch_output(x, key, torch.zeros(1), torch.full((1, 1), 3.0)).tolist()
        [[3.0], [0.0]]
    """
    return torch.relu(states.float() @ keys.T + biases) @ values


class PatchNeurons(EditMemory):
    """The patches of T-Patcher (arXiv 2301.09785): one ReLU neuron for each corrected token.

    They read the MLP's input at every token, prompts and generated ones alike. Where none fires,
    the MLP's output keeps its bits.

    Its buffers are ``keys`` [N, D], ``biases`` [N], ``values`` [N, D], and ``queries`` [N, D], the
    states that the neurons were made for, of which later edits have to keep clear; float32.

    Args:
        layer: The block whose MLP is patched.
    """

    fields: ClassVar[tuple[str, ...]] = ("keys", "biases", "values", "queries")
    keys: Tensor
    biases: Tensor
    values: Tensor
    queries: Tensor

    def __init__(self, layer: int) -> None:
        super().__init__(layer=layer)

    @override
    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        return beside_mlp(ModelTree.of(model), self.settings["layer"], self._add)

    def _add(self, states: Tensor) -> Tensor | None:
        if self.is_off:
            return None
        more = patch_output(states, self.keys, self.biases, self.values)
        return more if bool(more.any()) else None
