# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The parts of a model that its blocks stand among, found in its module tree."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_edit.core.linear_maps import holder, in_attention, is_linear, linears

__all__ = [
    "block_stacks",
    "hidden_size_of",
    "input_embeddings_of",
    "is_bare_norm",
    "lm_head_of",
    "norm_size",
    "shared_prefix",
]


def block_stacks(model: nn.Module, prefix: str = "") -> dict[str, nn.ModuleList]:
    """Outermost lists of modules that hold linear maps, by name."""
    found: dict[str, nn.ModuleList] = {}
    for name, child in model.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if (
            isinstance(child, nn.ModuleList)
            and len(child)
            and all(not is_linear(m) and any(True for _ in linears(m)) for m in child)
        ):
            found[path] = child
        else:
            found |= block_stacks(child, path)
    return found


def norm_size(module: nn.Module) -> int | None:
    """Width of a normalization layer; None for anything else."""
    parameters = dict(module.named_parameters())
    weight = parameters.pop("weight", None)
    if weight is None or weight.ndim != 1 or set(parameters) - {"bias"}:
        return None
    return int(weight.shape[0])


def is_bare_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization without weights, as OLMo has them."""
    bare = not any(True for _ in module.parameters())
    return bare and "norm" in type(module).__name__.lower()


def hidden_size_of(block: nn.Module) -> int | None:
    """Width of the hidden state: that of the block's outermost normalization.

    Norms inside attention or MLP may have another width.
    """
    norms = [
        (name.count("."), size)
        for name, module in block.named_modules()
        if (size := norm_size(module)) is not None and not in_attention(block, holder(name))
    ]
    return min(norms, key=lambda item: item[0])[1] if norms else None


def shared_prefix(one: str, other: str) -> int:
    """How many names two paths of modules begin with in common."""
    count = 0
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count


def input_embeddings_of(model: nn.Module) -> tuple[str, nn.Module | None]:
    """Name and module of the token embedding."""
    get: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)
    embeddings = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    if get is not None:
        wanted = get()
        return next(((n, m) for n, m in model.named_modules() if m is wanted), ("", wanted))
    return max(embeddings, key=lambda item: item[1].num_embeddings, default=("", None))


def lm_head_of(model: nn.Module) -> nn.Module | None:
    """The projection to the vocabulary."""
    get: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    if get is not None:
        return get()
    children = [m for m in model.children() if isinstance(m, nn.Linear)]
    return children[-1] if children else None
