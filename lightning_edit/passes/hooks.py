# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Forward hooks that are gone once they are not needed, whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

__all__ = ["hooked"]


@contextmanager
def hooked(
    after: Mapping[nn.Module, Callable[..., object]] | None = None,
    before: Mapping[nn.Module, Callable[..., object]] | None = None,
) -> Iterator[None]:
    """Context manager: modules with forward hooks, which are removed whatever happens in it.

    Args:
        after: Module to what is called after its ``forward``, with the module, its positional
            arguments and its output; the output is replaced by what is returned, if anything is.
        before: Module to what is called before its ``forward``, with the module, its positional
            and its keyword arguments; both are replaced by what is returned, if anything is.

    Examples:
        >>> import torch
        >>> layer, seen = nn.Linear(2, 2), []
        >>> with hooked({layer: lambda _, args, output: seen.append(output.shape)}):
        ...     _ = layer(torch.zeros(3, 2))
        >>> _ = layer(torch.zeros(3, 2))
        >>> seen
        [torch.Size([3, 2])]
    """
    hooks_after, hooks_before = dict(after or {}), dict(before or {})

    def remove() -> None:
        # By the function, since an interrupt may come before a handle has been kept.
        for module, hook in hooks_after.items():
            _remove(hook, module._forward_hooks)
        for module, hook in hooks_before.items():
            _remove(hook, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)

    try:
        try:
            for module, hook in hooks_before.items():
                module.register_forward_pre_hook(hook, with_kwargs=True)
            for module, hook in hooks_after.items():
                module.register_forward_hook(hook)
            yield
        finally:
            remove()
    finally:
        remove()  # what is left if the first time was interrupted


def _remove(
    hook: Callable[..., object],
    hooks: dict[int, Callable[..., object]],
    *further: dict[int, bool],
) -> None:
    """Takes a function out of a module's hooks, having taken its number out of further tables."""
    for number in [number for number, one in hooks.items() if one is hook]:
        for table in further:
            table.pop(number, None)
        hooks.pop(number, None)
