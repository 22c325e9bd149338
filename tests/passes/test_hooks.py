# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Hooks: what they are given and may change, and that they never stay."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edit.passes import hooks
from lightning_edit.passes.hooks import hooked


class Scaled(nn.Module):
    """A module with a keyword argument."""

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x * scale


def left(module: nn.Module) -> list[Any]:
    return [
        *module._forward_hooks,
        *module._forward_pre_hooks,
        *module._forward_pre_hooks_with_kwargs,
    ]


def test_hooks_see_and_change_what_goes_in_and_comes_out() -> None:
    module, seen = Scaled(), []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
        seen.append((args[0].item(), kwargs))
        return (args[0] + 1,), {"scale": 10.0}

    def leave(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append((args[0].item(), output.item()))
        return -output

    with hooked({module: leave}, {module: enter}):
        assert module(torch.tensor(2.0), scale=3.0) == -30
    assert seen == [(2.0, {"scale": 3.0}), (3.0, 30.0)]
    assert module(torch.tensor(2.0), scale=3.0) == 6
    assert not left(module)


def test_other_hooks_of_a_module_stay() -> None:
    module = Scaled()
    module.register_forward_hook(lambda _, __, output: output + 1)
    with hooked({module: lambda _, __, output: output * 2}):
        assert module(torch.tensor(1.0)) == 4
        with hooked({module: lambda _, __, output: output * 10}):
            assert module(torch.tensor(1.0)) == 40
    assert module(torch.tensor(1.0)) == 2


def test_hooks_are_gone_after_an_error() -> None:
    module = Scaled()

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), hooked(before={module: fail}):
        module(torch.tensor(1.0))
    assert not left(module)


def test_an_interrupt_at_any_line_leaves_no_hook() -> None:
    modules = [Scaled(), Scaled()]

    def use(interrupt_at: int) -> int:
        """Lines that were run in the file of `hooked`; the one with this number is interrupted."""
        lines = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != hooks.__file__:
                return None
            if event == "line":
                lines += 1
                if lines == interrupt_at:
                    raise KeyboardInterrupt
            return trace

        kept = sys.gettrace()
        sys.settrace(trace)
        try:
            with hooked(
                {module: lambda *_: None for module in modules},
                {module: lambda *_: None for module in modules},
            ):
                modules[0](torch.tensor(1.0))
        finally:
            sys.settrace(kept)
        return lines

    count = use(0)
    assert count > 20
    for line in range(1, count + 1):
        with pytest.raises(KeyboardInterrupt):
            use(line)
        assert not [hook for module in modules for hook in left(module)], line
