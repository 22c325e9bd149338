# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The short inner loops of editors that fine-tune a few parameters of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import EditError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.sharding import is_sharded, local_shard, reshard, whole_tensor

__all__ = ["InnerLoop", "parameter_names"]


def parameter_names(tree: ModelTree, layers: Sequence[int] | None = None) -> list[str]:
    """Names of all parameters of some layers, or of the whole model.

    Args:
        tree: The model.
        layers: Layers of the stack that the tree is of; negative ones count from the end.

    Raises:
        LocatorError: If a layer does not exist.
    """
    names = [name for name, p in tree.model.named_parameters() if p.is_floating_point()]
    if layers is None:
        return names
    prefixes = tuple(f"{tree.block_names[tree.index(layer)]}." for layer in layers)
    return [name for name in names if name.startswith(prefixes)]


class InnerLoop:
    """Steps of an optimizer on some of a model's parameters.

    Weights of lower precision are kept beside the model in float32, where small steps add up, and
    rounded into it. The caller puts the weights back.

    Args:
        model: The model, changed in place.
        names: Names of the parameters.
        optimizer: Makes the optimizer of parameters.
        radius: Bound on the change of every entry (an L∞ ball around the weights at the start).

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> inner = InnerLoop(layer, ["bias"], lambda p: torch.optim.SGD(p, lr=1.0), radius=0.5)
        >>> inner.step(layer(torch.ones(1, 2)).sum())
        >>> inner.delta().changes["bias"].round(decimals=6)
        tensor([-0.5000])
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        radius: float | None = None,
    ) -> None:
        self.radius = radius
        reshard(model)
        self._is_sharded = is_sharded(model)
        self.parameters = {name: model.get_parameter(name) for name in names}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.starts = {
            name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()
        }
        self.masters = {
            name: p
            if p.dtype == torch.float32
            else nn.Parameter(p.detach().to(torch.float32, copy=True))
            for name, p in self.parameters.items()
        }
        self.optimizer = optimizer(self.masters.values())

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of the loss, which is zero where a parameter had no part.

        Raises:
            EditError: If no parameter had a part.
        """
        parameters = list(self.parameters.values())
        gradients: Sequence[Tensor | None]
        if self._is_sharded:  # gradients come with the parts, and not otherwise
            for parameter in parameters:
                parameter.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = [parameter.grad for parameter in parameters]
        else:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise EditError(
                f"The loss has no gradient at {', '.join(list(self.parameters)[:3])}, so that "
                "nothing can be learned there. Tune parameters that the model's answer depends on."
            )
        for master, gradient in zip(self.masters.values(), gradients, strict=True):
            master.grad = None if gradient is None else gradient.float()
        self.optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                if self.radius is not None:
                    start = local_shard(self.starts[name])
                    local_shard(master).clamp_(start - self.radius, start + self.radius)
                if master is not self.parameters[name]:
                    self.parameters[name].copy_(master)

    def delta(self) -> WeightDelta:
        """How far the parameters are from where they started."""
        ends = {name: whole_tensor(master.detach()) for name, master in self.masters.items()}
        starts = {name: whole_tensor(start) for name, start in self.starts.items()}
        return WeightDelta(
            {
                name: end - starts[name]
                for name, end in ends.items()
                if not torch.equal(end, starts[name])
            }
        )
