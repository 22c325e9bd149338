# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A caller's model while it is worked on, and how it is given back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from lightning_edit.core.wrappers import is_compiled

__all__ = ["borrowed"]

# What a memory holds is no part of the model that it is attached to.
_BESIDE = "edit_memory."


@contextmanager
def borrowed(model: nn.Module, trainable: Collection[str] = ()) -> Iterator[None]:
    """Context manager: a model in eval mode, which is given back as it came, whatever happens.

    Given back are the mode of each module, ``requires_grad`` and the gradient of each parameter,
    and the device, if all of the model was on one. Parameters are frozen also where no gradients
    are asked for: processors have other kernels for those that are not.

    Args:
        model: The model.
        trainable: Names of the parameters that get gradients in it.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> with borrowed(layer, ["bias"]):
        ...     layer.training, layer.weight.requires_grad, layer.bias.requires_grad
        (False, False, True)
        >>> layer.training, layer.weight.requires_grad, layer.bias.requires_grad
        (True, True, True)
    """
    modes = [(module, module.training) for module in model.modules()]
    named = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in named.items()}
    gradients = {name: p.grad for name, p in named.items()}
    device = _device_of(model)

    def give_back() -> None:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode
        # A sharded model may have other parameters by now, under the same names: whole ones, which
        # stand for those that it had and will have again.
        now = dict(model.named_parameters())
        for name, flag in flags.items():
            for parameter in (named[name], now.get(name, named[name])):
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)
            is_same = now.get(name, named[name]) is named[name]
            if is_same and named[name].grad is not gradients[name]:
                named[name].grad = gradients[name]
        if device is not None and _device_of(model) not in (device, None):
            model.to(device)

    # What is compiled does not see hooks that come later, and is compiled anew for each shape.
    eager = torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
    is_given_back = False
    try:
        try:
            for module, mode in modes:
                if mode:
                    module.training = False
            for name, parameter in named.items():
                wanted = name in trainable
                if not name.startswith(_BESIDE) and parameter.requires_grad != wanted:
                    parameter.requires_grad_(wanted)
            with eager:
                yield
        finally:
            give_back()
            is_given_back = True
    finally:
        if not is_given_back:  # the first time was interrupted
            give_back()


def _device_of(model: nn.Module) -> torch.device | None:
    """Where all of a model is; None if its parameters are on several devices."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else None
