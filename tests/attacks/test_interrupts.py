# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""An edit that is interrupted is in the model or it is not, and can be undone or made again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_edit import GRACE, FineTune, MemoryWrite, WeightDelta
from lightning_edit.core import delta, edit, memory, side_memory
from lightning_edit.core.change import LowRank
from lightning_edit.core.errors import EditError
from lightning_edit.core.side_memory import EditMemory, MemoryEntry
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.optim import EditOptimizer
from tests.attacks.helpers import interrupted_at

FILES = {str(module.__file__) for module in (delta, edit, memory, side_memory)}


class TwoRows(EditMemory):
    """Adds the sum of its entries."""

    fields = ("bias", "more")

    def hook(self, model: nn.Module) -> list[Any]:
        return [model.register_forward_hook(lambda _, __, y: y + self.get_buffer("bias").sum(0))]


def _weights() -> tuple[nn.Module, WeightDelta]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    change = LowRank(torch.ones(3, 1), torch.ones(3, 1))
    return model, WeightDelta({"0.weight": change, "1.weight": torch.ones(3, 3)})


def _memory(is_attached: bool) -> tuple[nn.Module, MemoryWrite]:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    row = {"bias": torch.ones(3), "more": torch.zeros(2)}
    if is_attached:
        held = TwoRows()
        held.attach_(model)
        held.write({"old": MemoryEntry({n: 2 * t for n, t in row.items()}, {"old": {}})})
    return model, MemoryWrite("TwoRows", {}, {"new": MemoryEntry(row, {"new": {}})})


CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "weights": _weights,
    "new memory": lambda: _memory(False),
    "memory": lambda: _memory(True),
}


def _state(model: nn.Module) -> tuple[Any, ...]:
    held = EditMemory.find(model)
    entries = None if held is None else list(held.entries)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return (
        entries,
        hooks,
        *(t.tolist() for t in model.parameters()),
        model(torch.ones(1, 3)).tolist(),
    )


def _apply(model: nn.Module, one: Any) -> None:
    one.apply_(model)


def _with(model: nn.Module, one: Any) -> None:
    with one.applied(model):
        assert model(torch.ones(1, 3)) is not None


@pytest.mark.parametrize("kind", CASES)
def test_an_interrupt_at_any_line_leaves_all_or_nothing(kind: str) -> None:
    make = CASES[kind]

    def undo(model: nn.Module, one: Any) -> None:
        one.revert_(model)

    def without(model: nn.Module, one: Any) -> None:
        with one.reverted(model):
            assert model(torch.ones(1, 3)) is not None

    for call, begins_applied in ((_apply, False), (_with, False), (undo, True), (without, True)):
        line, count = 0, 1
        while line < count:
            line += 1
            model, one = make()
            out = _state(model)
            one.apply_(model)
            into = _state(model)
            if not begins_applied:
                one.revert_(model)
                assert _state(model) == out
            if line == 1:
                count = interrupted_at(0, FILES, lambda: call(model, one))  # noqa: B023
                continue
            try:
                interrupted_at(line, FILES, lambda: call(model, one))  # noqa: B023
            except KeyboardInterrupt:
                now = _state(model)
                if call in (_with, without):
                    assert now == (into if begins_applied else out), (kind, call, line)
                assert now in (out, into), (kind, call.__name__, line)
                if now == into:
                    one.revert_(model)
                assert _state(model) == out, (kind, call.__name__, line)
                one.apply_(model)
                assert _state(model) == into


def test_a_failed_apply_takes_its_memory_off() -> None:
    model, one = _memory(False)

    def failing(*_: Any) -> None:
        raise RuntimeError("no room")

    one.build = lambda: type("Failing", (TwoRows,), {"write": failing})()  # type: ignore[method-assign]
    one.kind = "Failing"
    with pytest.raises(RuntimeError, match="no room"), warnings.catch_warnings():
        one.apply_(model)
    assert EditMemory.find(model) is None


def test_edits_that_are_not_finite_are_refused() -> None:
    for make in CASES.values():
        model, one = make()
        before = _state(model)
        name, tensor = next(iter(one.values()))
        tensor.view(-1)[0] = float("nan")
        with pytest.raises(EditError, match=f"not finite in `{name}`"):
            one.apply_(model)
        assert _state(model) == before


def test_edits_too_large_for_the_precision_are_rolled_back() -> None:
    model, one = _weights()
    model.half()
    one = one * 1e5
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(EditError, match="not finite in float16"):
        one.apply_(model)
    named = dict(model.named_parameters())
    optimizer = EditOptimizer(model, {n: named[n].detach().clone() for n in one.changes})
    optimizer.stage(one)
    with pytest.raises(EditError, match="not finite in float16"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not len(optimizer.delta)


@pytest.mark.parametrize("cls", [FineTune, GRACE])
def test_settings_that_lead_nowhere_write_nothing(cls: Any) -> None:
    model, tokenizer = trained_tiny_model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    editor = cls.from_model(model, tokenizer, layers=[2], steps=2, lr=float("inf"))
    with pytest.raises(EditError, match="not finite"):
        editor.edit(tiny_requests(1))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
