# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The model in what wraps it, and the names that its parameters have without wrappers."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lightning_edit.core.errors import ModelError
from lightning_edit.core.sharding import reshard

__all__ = ["check_not_compiled", "is_compiled", "plain_names", "plain_parameters", "unwrapped"]

# Where `torch.compile` keeps the module that it wraps.
_COMPILED = "_orig_mod"


def unwrapped(model: Any) -> Any:
    """The model that a compiled, parallel or peft model wraps.

    Where parts of a model were compiled apart, what contains them is copied without their
    wrappers; parameters, buffers, hooks and all other modules are the same objects.

    Args:
        model: A model, or what wraps one; a plain model is returned as it is.

    Raises:
        ModelError: If an adapter of the wrapper is no part of the model in it.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(torch.compile(nn.Linear(2, 2, bias=False), backend="eager"))
        >>> [name for name, _ in model.named_parameters()]
        ['0._orig_mod.weight']
        >>> [(name, p is model[0].weight) for name, p in unwrapped(model).named_parameters()]
        [('0.weight', True)]
    """
    while (inner := _inside(model)) is not None:
        model = inner
    return _bare(model, {}) if isinstance(model, nn.Module) else model


def is_compiled(model: nn.Module) -> bool:
    """Whether a model or a part of it is compiled, which does not see hooks that come later."""
    return any(
        _COMPILED in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def check_not_compiled(model: nn.Module) -> None:
    """Checks that hooks which are put into a model take effect.

    Raises:
        ModelError: If it is compiled.
    """
    if is_compiled(model):
        raise ModelError(
            f"{type(model).__name__} is compiled, and would go on as if nothing were remembered: "
            "what was compiled does not see hooks that come later. Give the plain model, and "
            "compile it once its edits are made."
        )


def plain_names(model: nn.Module) -> dict[str, str]:
    """Names of the model's own parameters, without and with what wraps them.

    Args:
        model: A language model, perhaps with LoRA layers or compiled parts in it.

    Returns:
        For each parameter its name in the plain model and its name in this one. The adapter's own
        parameters are left out.

    Examples:
        >>> plain_names(nn.Sequential(nn.Linear(2, 2, bias=False)))
        {'0.weight': '0.weight'}
    """
    adapters = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)
    ]
    names = {}
    for name, _ in model.named_parameters():
        holder = next((a for a in adapters if name.startswith(f"{a}.")), None)
        plain = name
        if holder is not None:
            if not name.startswith(f"{holder}.base_layer."):
                continue
            plain = f"{holder}.{name.removeprefix(f'{holder}.base_layer.')}"
        names[".".join(part for part in plain.split(".") if part != _COMPILED)] = name
    return names


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model, or of the one that it wraps, by their names in the plain model.

    Args:
        model: A model, or what wraps one. An adapter's own parameters are left out. What a pass
            has left whole of a sharded model lies in its parts again.
    """
    model = unwrapped(model)
    reshard(model)
    named = dict(model.named_parameters())
    return {name: named[actual] for name, actual in plain_names(model).items()}


def _inside(model: Any) -> Any:
    """What a wrapper wraps; None of what is none."""
    parts = getattr(model, "_modules", {})
    if _COMPILED in parts:
        return parts[_COMPILED]
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    if hasattr(type(model), "get_base_model"):  # of peft
        kinds = getattr(model, "peft_config", {})
        if any(getattr(kind, "is_prompt_learning", False) for kind in kinds.values()):
            raise ModelError(
                f"{type(model).__name__} has a prompt that was learned, which is no part of the "
                "model that would be edited. Give the model itself: `model.get_base_model()`."
            )
        return model.get_base_model()
    return None


def _within(module: nn.Module) -> nn.Module:
    """What a compiled module wraps; any other itself."""
    inner = module._modules.get(_COMPILED)
    return module if inner is None else inner


def _bare(module: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module without compiled parts: itself if it has none."""
    if module not in known:
        children = {
            name: None if child is None else _bare(_within(child), known)
            for name, child in module._modules.items()
        }
        found = module
        if any(children[name] is not child for name, child in module._modules.items()):
            found = copy.copy(module)
            found.__dict__["_modules"] = children
        known[module] = found
    return known[module]
