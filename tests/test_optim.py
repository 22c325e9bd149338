# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The optimizer whose step writes an edit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edit.core.delta import LowRank, WeightDelta
from lightning_edit.core.edit import Provenance
from lightning_edit.core.errors import EditError
from lightning_edit.optim import EditOptimizer


def memory() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(6, 5, bias=False), "b": nn.Linear(6, 5, bias=False)})


def optimizer_of(model: nn.Module) -> EditOptimizer:
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    return EditOptimizer(model, originals)


def edit_of(name: str, scale: float = 1.0, dense: bool = False, request: str = "") -> WeightDelta:
    change: Tensor | LowRank = LowRank(scale * torch.randn(5, 1), torch.randn(6, 1))
    if dense:
        change = scale * torch.randn(5, 6)
    return WeightDelta({f"{name}.weight": change}, Provenance(request_ids=(request or name,)))


def commit(optimizer: EditOptimizer, edit: WeightDelta) -> None:
    optimizer.stage(edit)
    optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_weights_are_originals_plus_the_sum_of_edits() -> None:
    model = memory()
    optimizer = optimizer_of(model)
    edits = [edit_of("a"), edit_of("b", dense=True), edit_of("a", 0.1), edit_of("b")]
    for edit in edits:
        commit(optimizer, edit)
    for name in ("a.weight", "b.weight"):
        change = sum(edit.dense(name) for edit in edits if name in edit.changes)
        wanted = optimizer.originals[name] + change
        torch.testing.assert_close(model.get_parameter(name).data, wanted)
    assert optimizer.delta.provenance.request_ids == ("a", "b")


def test_a_step_without_an_edit_changes_nothing() -> None:
    model = memory()
    optimizer = optimizer_of(model)
    before = weights(model)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert equal(weights(model), before)
    # An edit is written once.
    commit(optimizer, edit_of("a"))
    assert optimizer.staged is None
    after = weights(model)
    optimizer.step()
    assert equal(weights(model), after)


def test_a_staged_edit_can_be_replaced_or_dropped() -> None:
    model = memory()
    optimizer = optimizer_of(model)
    before = weights(model)
    optimizer.stage(edit_of("a"))
    assert optimizer.staged is not None
    optimizer.stage(0.0 * optimizer.staged)
    optimizer.step()
    assert equal(weights(model), before)


def test_parameters_that_were_not_announced_are_refused() -> None:
    model = memory()
    optimizer = EditOptimizer(model, {"a.weight": model.get_parameter("a.weight").detach().clone()})
    before = weights(model)
    optimizer.stage(edit_of("b"))
    with pytest.raises(EditError, match=r"changes b\.weight, which .* Announced: a\.weight"):
        optimizer.step()
    assert equal(weights(model), before)


def test_an_interruption_between_two_tensors_leaves_the_last_committed_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = memory()
    optimizer = optimizer_of(model)
    commit(optimizer, edit_of("a"))
    before, delta = weights(model), optimizer.delta
    write = WeightDelta.write_

    def half(self: WeightDelta, model: nn.Module, originals: Any) -> None:
        monkeypatch.setattr(WeightDelta, "write_", write)
        first = next(iter(self.changes))
        WeightDelta({first: self.changes[first]}).write_(model, originals)
        assert not equal(weights(model), before)
        raise KeyboardInterrupt

    optimizer.stage(edit_of("a") + edit_of("b"))
    monkeypatch.setattr(WeightDelta, "write_", half)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert equal(weights(model), before)
    assert optimizer.delta is delta


def test_rewinding_goes_back_bit_for_bit() -> None:
    model = memory()
    optimizer = optimizer_of(model)
    before = weights(model)
    commit(optimizer, edit_of("a"))
    middle, delta = weights(model), optimizer.delta
    commit(optimizer, edit_of("b", 1e3))
    optimizer.rewind(delta)
    assert equal(weights(model), middle)
    optimizer.rewind()
    assert equal(weights(model), before)
    assert not optimizer.delta.changes


def test_the_state_survives_a_file_without_pickles() -> None:
    model = memory()
    optimizer = optimizer_of(model)
    for edit in (edit_of("a"), edit_of("b", dense=True, request="b.with.dots")):
        commit(optimizer, edit)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = memory()
    resumed = EditOptimizer(other, optimizer.originals)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.delta.provenance.request_ids == ("a", "b.with.dots")
    assert isinstance(resumed.delta.changes["a.weight"], LowRank)
    # The next step writes the whole sum.
    next_edit = edit_of("a")
    commit(optimizer, next_edit)
    commit(resumed, next_edit)
    assert equal(weights(other)[:1], weights(model)[:1])
    resumed.rewind(resumed.delta)
    assert equal(weights(other), weights(model))


@pytest.mark.filterwarnings("ignore:.*survives rounding:UserWarning")
def test_many_small_edits_do_not_drown_in_rounding() -> None:
    model = memory().bfloat16()
    optimizer = optimizer_of(model)
    edit = edit_of("a", 1e-3)
    for _ in range(50):
        commit(optimizer, edit)
    wanted = optimizer.originals["a.weight"].float() + 50 * edit.dense("a.weight")
    found = model.get_parameter("a.weight").detach().float()
    # One rounding to eight bits of weights below one; each edit by itself is smaller than that.
    torch.testing.assert_close(found, wanted, rtol=2**-8, atol=1e-4)
    assert (50 * edit.dense("a.weight")).abs().max() > 0.05
