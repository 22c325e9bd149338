# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The linear maps of a module, by name: what they are, how large, and where they lie."""

# Shapes: O outputs of a linear map, I its inputs.

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

__all__ = [
    "ATTENTION",
    "attention_root",
    "holder",
    "in_attention",
    "is_linear",
    "linears",
    "sizes",
]

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def is_linear(module: nn.Module) -> bool:
    """An nn.Linear, or transformers' Conv1D, a linear map stored as [I, O]."""
    if isinstance(module, nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.ndim == 2
        and isinstance(getattr(module, "nf", None), int)
    )


def sizes(linear: nn.Module) -> tuple[int, int]:
    """(O, I) of a linear module."""
    if isinstance(linear, nn.Linear):
        return linear.out_features, linear.in_features
    weight = cast(Tensor, linear.weight)
    return int(weight.shape[1]), int(weight.shape[0])


def linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Linear maps by name, in order; of an adapter's wrapper only the wrapped layer."""
    if is_linear(module):
        yield prefix, module
        return
    base = getattr(module, "base_layer", None)
    children = (
        [("base_layer", base)] if isinstance(base, nn.Module) else list(module.named_children())
    )
    for name, child in children:
        yield from linears(child, f"{prefix}.{name}" if prefix else name)


def holder(name: str) -> str:
    """Name of the module that holds a linear map, an adapter's wrapper left aside."""
    return name.removesuffix(".base_layer").rpartition(".")[0]


def in_attention(block: nn.Module, name: str) -> bool:
    """Whether a module of the block lies in an attention, by the names on its path."""
    module = block
    for part in name.split("."):
        if not part:
            return False
        module = module.get_submodule(part)
        if ATTENTION.search(part) or ATTENTION.search(type(module).__name__):
            return True
    return False


def attention_root(block: nn.Module, name: str) -> str:
    """Name of the outermost module on a path that is an attention by its name."""
    parts = name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return next((path for path in paths if in_attention(block, path)), "")
