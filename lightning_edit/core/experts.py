# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: where their pairs are kept, and the keys that a router makes of a state.

The output of such a layer is linear in the last projections of all experts together,

    out = Σ_e g_e W_e k_e = [W_1 … W_E] k,    k = (g_1 k_1, …, g_E k_E),

with k_e what enters the last projection of expert e, and g_e its gate, 0 for those that the router
leaves out. So one wide matrix, the experts' side by side, is to the stacked key k what the last
projection of an MLP is to its own (arXiv 2602.10965). Nothing here knows a router: the layer is
run, its products with slices of a stack of matrices are seen, and where their results go is told by
a gradient.
"""

# Shapes: n states, E experts, O outputs and M inputs of each one's last projection, O = D hidden.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from lightning_edit.core.change import LowRank
from lightning_edit.core.errors import LocatorError, ModelError

__all__ = ["ExpertSite", "RoutedKeys", "find_experts"]

PROBES = 16  # random states that a layer is run on, to see its products
# Largest distance of a token's bits, as a gradient gives them, from 0 and 1.
MAX_BLUR = 0.2
# Where a configuration of transformers says how experts are run.
KERNEL = "_experts_implementation"

_FAILURES = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError)


@dataclass(frozen=True)
class RoutedKeys:
    """What entered the last projection of one expert.

    Args:
        expert: Its index.
        rows: Which of the states were sent to it, [n] int64.
        keys: What it made of them, [n, M] float32.
        gates: What its outputs are multiplied by, [n] float32.
    """

    expert: int
    rows: Tensor
    keys: Tensor
    gates: Tensor


@dataclass(frozen=True)
class ExpertSite:
    """The last projections of all experts of a layer, as one matrix [O, E M] of stacked keys.

    It stands where a ``WeightSite`` stands for an MLP of one piece.

    Args:
        name: Name of the parameter, of shape [E, O, M], or [E, M, O].
        module_name: Name of the module that routes, from hidden state to hidden state.
        layer: Index of the block it belongs to.
        transposed: Whether the parameter is stored as [E, M, O] (gpt-oss).
        out_features: O.
        width: M.
        experts: E.
        chosen: Experts that may be changed; all of them if None.

    Examples:
        >>> from lightning_edit.core.change import LowRank
        >>> site = ExpertSite("down_proj", "mlp", 0, False, out_features=2, width=3, experts=4)
        >>> site.in_features, site.change(torch.ones(2, 1), torch.ones(12, 1)).shape
        (12, torch.Size([4, 2, 3]))
    """

    name: str
    module_name: str
    layer: int
    transposed: bool
    out_features: int
    width: int
    experts: int
    chosen: tuple[int, ...] | None = None

    @property
    def in_features(self) -> int:
        """E M, the length of a stacked key."""
        return self.experts * self.width

    @property
    def moment_shape(self) -> tuple[int, ...]:
        """Shape of the second moments of keys, one of each expert."""
        return self.experts, self.width, self.width

    def module(self, model: nn.Module) -> nn.Module:
        """The module that sends states to experts and adds up what these return."""
        return model.get_submodule(self.module_name)

    def parameter(self, model: nn.Module) -> nn.Parameter:
        """The stack of last projections."""
        return model.get_parameter(self.name)

    def among(self, experts: Sequence[int] | None) -> Self:
        """The same with these experts alone to be changed; None for all of them.

        Raises:
            LocatorError: If there is no such expert.
        """
        if experts is None:
            return self
        strange = [e for e in experts if not 0 <= e < self.experts]
        if strange or not experts:
            raise LocatorError(
                f"`experts` names {strange or 'none'}, but layer {self.layer} has the experts 0 to "
                f"{self.experts - 1}. Name some of them, or None for those that the router picks."
            )
        return replace(self, chosen=tuple(sorted(set(experts))))

    def keys(self, model: nn.Module, states: Tensor) -> Tensor:
        """Stacked keys (g_1 k_1, …, g_E k_E) of hidden states that enter the module.

        Args:
            model: The model.
            states: [n, D].

        Returns:
            [n, E M] float32; zero for experts that a state is not sent to.
        """
        keys = states.new_zeros(len(states), self.experts, self.width, dtype=torch.float32)
        for part in self.routed(model, states):
            keys[part.rows, part.expert] = part.gates[:, None] * part.keys
        return keys.flatten(1)

    def sets(self, model: nn.Module, states: Tensor) -> Tensor:
        """Which experts hidden states that enter the module are sent to, [n, E] bool."""
        sets = torch.zeros(len(states), self.experts, dtype=torch.bool, device=states.device)
        for part in self.routed(model, states):
            sets[part.rows, part.expert] = True
        return sets

    def samples(self, model: nn.Module, states: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Keys k_e of hidden states that enter the module, with their expert, ungated, [·, M]."""
        for part in self.routed(model, states):
            yield (part.expert,), part.keys

    def kept(self, keys: Tensor) -> Tensor:
        """Stacked keys of the chosen experts, zero for the others: [..., E M]."""
        if self.chosen is None:
            return keys
        mask = keys.new_zeros(self.experts, 1)
        mask[list(self.chosen)] = 1
        return (self._blocks(keys) * mask).flatten(-2)

    def picked(self, keys: Tensor) -> list[int]:
        """Experts that stacked keys, [..., E M], are not zero at."""
        blocks = self._blocks(keys).any(-1)
        return [int(e) for e in blocks.reshape(-1, self.experts).any(0).nonzero()]

    def change(self, u: Tensor, v: Tensor) -> LowRank:
        """The change u vᵀ of the wide matrix, in the parameter's own layout.

        Args:
            u: [O, rank].
            v: [E M, rank].
        """
        blocks = v.reshape(self.experts, self.width, -1)
        return LowRank(blocks, u[None]) if self.transposed else LowRank(u[None], blocks)

    def matrix(self, change: Tensor) -> Tensor:
        """A tensor of the parameter's shape as the wide matrix, [O, E M]."""
        per_expert = change.mT if self.transposed else change
        return per_expert.transpose(0, 1).flatten(1)

    @torch.inference_mode(False)
    def routed(self, model: nn.Module, states: Tensor) -> list[RoutedKeys]:
        """What each expert makes of hidden states that are sent to it.

        Args:
            model: The model, in eval mode.
            states: Hidden states that enter the module, [n, D].

        Raises:
            ModelError: If the layer's products are not those that were found in it before.
        """
        module, stack = self.module(model), self.parameter(model)
        products = _Products({self.name: stack}, marks=True)
        with torch.enable_grad(), _one_by_one(module), products:
            output = module.forward(states.detach().clone()[None])  # none of its hooks
        output = output[0] if isinstance(output, tuple) else output
        tokens, n = output.reshape(len(states), -1), len(states)
        bits = max(1, (n - 1).bit_length())
        if not products.seen or bits >= tokens.shape[1]:
            raise self._strange(model)
        # Each state is written down in binary digits, and the gradient of a result says what became
        # of it: the gate, times the digits of the one state that it goes to.
        index = torch.arange(n, device=tokens.device)
        digits = torch.stack([index >> b & 1 for b in range(bits)], 1)
        marks = torch.zeros_like(tokens)
        marks[:, 0], marks[:, 1 : bits + 1] = 1, digits.to(marks.dtype)
        results = [product.result for product in products.seen]
        gradients = torch.autograd.grad(
            (tokens * marks).sum(), results, allow_unused=True, materialize_grads=True
        )
        found: list[RoutedKeys] = []
        for product, gradient in zip(products.seen, gradients, strict=True):
            told = gradient.float().reshape(-1, gradient.shape[-1])
            is_used = told[:, 0] != 0
            gates, told = told[is_used, 0], told[is_used, 1 : bits + 1]
            read = told / gates[:, None]
            if bool(
                ((read - read.round()).abs() > MAX_BLUR).any() or (read.round().abs() > 1).any()
            ):
                raise self._strange(model)
            rows = (read.round().long() << torch.arange(bits, device=read.device)).sum(1)
            keys = product.key.detach().float().reshape(-1, self.width)[is_used]
            found.append(RoutedKeys(product.expert, rows, keys, gates))
        return found

    def _blocks(self, keys: Tensor) -> Tensor:
        """Stacked keys, [..., E M], as [..., E, M]."""
        return keys.reshape(*keys.shape[:-1], self.experts, self.width)

    def _strange(self, model: nn.Module) -> ModelError:
        return ModelError(
            f"`{self.module_name}` of {type(model).__name__} does not give each hidden state the "
            f"sum of what experts make of it by `{self.name}`, so that no expert has keys. Choose "
            "a method that needs none, such as LoRA."
        )


def find_experts(
    model: nn.Module, block_name: str, layer: int, hidden_size: int, stacks: Sequence[str]
) -> ExpertSite:
    """The last projections of a block's experts, found by running what holds them.

    Args:
        model: The model.
        block_name: Name of the block.
        layer: Its index.
        hidden_size: D.
        stacks: Names of parameters of the block that are stacks of matrices.

    Raises:
        LocatorError: If the layer cannot be run on hidden states alone, or has no product of a
            slice of a stack that returns to the hidden size.
    """
    parameters = {name: model.get_parameter(name) for name in stacks}
    [top, *others] = {name.removeprefix(f"{block_name}.").split(".")[0] for name in stacks}
    module_name = f"{block_name}.{top}"
    module, stack = model.get_submodule(module_name), next(iter(parameters.values()))
    products = _Products(parameters)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, PROBES, hidden_size, generator=generator).to(stack.device, stack.dtype)
    why = ""
    if others:
        why = "its experts lie in several modules"
    else:
        try:
            with torch.no_grad(), _one_by_one(module), products:
                module.forward(states)
        except _FAILURES as reason:
            why = f"it cannot be run on hidden states alone ({type(reason).__name__}: {reason})"
    last = [p for p in products.seen if p.result.shape[-1] == hidden_size]
    if why or not last:
        raise LocatorError(
            f"The experts of layer {layer} (`{module_name}`) of {type(model).__name__} cannot be "
            f"edited: {why or 'no expert is seen to return to the hidden size'}. Choose a method "
            "that needs none, such as LoRA."
        )
    found = last[-1]
    return ExpertSite(
        name=found.stack,
        module_name=module_name,
        layer=layer,
        transposed=found.is_transposed,
        out_features=hidden_size,
        width=found.key.shape[-1],
        experts=len(parameters[found.stack]),
    )


@dataclass(frozen=True)
class _Product:
    """A product of rows with one matrix of a stack, the result a leaf that has gradients."""

    stack: str
    expert: int
    is_transposed: bool
    key: Tensor
    result: Tensor


class _Products(TorchFunctionMode):
    """Sees products of rows with single matrices of stacks.

    Args:
        stacks: Parameters of three dimensions, by name.
        marks: Make the results leaves of what is computed of them.
    """

    def __init__(self, stacks: Mapping[str, Tensor], *, marks: bool = False) -> None:
        super().__init__()
        self.seen: list[_Product] = []
        self._stacks = stacks
        self._marks = marks

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if len(args) < 2 or not all(isinstance(x, Tensor) for x in (args[0], args[1], result)):
            return result
        key, matrix, product = cast(tuple[Tensor, Tensor, Tensor], (args[0], args[1], result))
        if matrix.ndim != 2 or key.ndim != 2 or product.ndim != 2:
            return result
        for name, stack in self._stacks.items():
            offset = matrix.storage_offset() - stack.storage_offset()
            is_part = 0 <= offset < stack.numel() and matrix.numel() == stack[0].numel()
            if not is_part or _memory(matrix) != _memory(stack):
                continue
            matrix_OI = matrix if func is linear else matrix.mT
            if (*product.shape, key.shape[1]) != (len(key), *matrix_OI.shape):
                continue
            product = product.detach().requires_grad_() if self._marks else product
            is_transposed = matrix_OI.stride() != stack.stride()[1:]
            expert = offset // stack.stride(0)
            self.seen.append(_Product(name, expert, is_transposed, key, product))
            return product
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _one_by_one(module: nn.Module) -> Iterator[None]:
    """Context manager: experts are run one after another, not by one kernel for all of them."""
    configs = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    kept = [(c, k) for c in configs.values() if (k := getattr(c, KERNEL, None)) is not None]
    try:
        for config, _ in kept:
            setattr(config, KERNEL, "eager")
        yield
    finally:
        for config, kernel in kept:
            setattr(config, KERNEL, kernel)
