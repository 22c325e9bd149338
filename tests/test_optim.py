# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A step writes the staged edit; the weights are always the originals plus the sum of edits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_edit.core import delta as delta_module
from lightning_edit.core.change import Change, LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import EditError
from lightning_edit.core.provenance import Provenance
from lightning_edit.core.sharding import local_change
from lightning_edit.optim import EditOptimizer
from tests import zoo

NAMES = tuple(f"model.layers.{i}.mlp.down_proj.weight" for i in range(3))
SHAPE = (32, 64)


def _optimizer(dtype: torch.dtype = torch.float32) -> EditOptimizer:
    model = zoo.build("llama").to(dtype)
    return EditOptimizer(model, {n: model.get_parameter(n).detach().clone() for n in NAMES})


def _edit(seed: int, *names: str, size: float = 0.1, is_dense: bool = False) -> WeightDelta:
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Any] = {}
    for name in names or NAMES:
        u, v = (torch.randn(n, 1, generator=generator) for n in SHAPE)
        low = LowRank(size * u, v)
        changes[name] = low.dense() if is_dense else low
    return WeightDelta(changes, Provenance(request_ids=(f"r{seed}",)))


def _step(optimizer: EditOptimizer, *edits: WeightDelta) -> None:
    for edit in edits:
        optimizer.stage(edit)
        optimizer.step()


def _weights(optimizer: EditOptimizer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in optimizer.model.named_parameters()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_step_writes_the_staged_edit() -> None:
    optimizer = _optimizer()
    before = _weights(optimizer)
    edit = _edit(0, NAMES[1])
    optimizer.stage(edit)
    staged = [optimizer.staged]
    assert _same(_weights(optimizer), before)
    optimizer.step()
    staged.append(optimizer.staged)
    assert staged == [edit, None]
    after = _weights(optimizer)
    assert torch.equal(after.pop(NAMES[1]), before.pop(NAMES[1]) + edit.dense(NAMES[1]))
    assert _same(after, before)


def test_a_step_without_an_edit() -> None:
    optimizer = _optimizer()
    _step(optimizer, _edit(0))
    before = _weights(optimizer)
    assert optimizer.step(lambda: 3.5) == 3.5
    assert optimizer.step() is None
    assert _same(_weights(optimizer), before)
    assert optimizer.delta.provenance.request_ids == ("r0",)


def test_the_closure_runs_before_the_edit() -> None:
    optimizer = _optimizer()
    before = _weights(optimizer)
    seen = []

    def closure() -> None:
        seen.append(_same(_weights(optimizer), before))
        optimizer.stage(_edit(0))

    optimizer.step(closure)
    assert seen == [True]
    assert not _same(_weights(optimizer), before)


def test_a_staged_edit_can_be_replaced() -> None:
    """What a callback may do before the step."""
    optimizer, other = _optimizer(), _optimizer()
    optimizer.stage(_edit(0))
    optimizer.stage(0.5 * _edit(0))
    optimizer.step()
    _step(other, 0.5 * _edit(0))
    assert _same(_weights(optimizer), _weights(other))


def test_edits_add_up() -> None:
    optimizer = _optimizer()
    before = _weights(optimizer)
    _step(optimizer, _edit(0), _edit(1, NAMES[0]), _edit(2, NAMES[2], is_dense=True))
    assert optimizer.delta.provenance.request_ids == ("r0", "r1", "r2")
    total = _edit(0) + _edit(1, NAMES[0]) + _edit(2, NAMES[2], is_dense=True)
    for name in NAMES:
        expected = before[name] + total.dense(name)
        assert torch.equal(optimizer.model.get_parameter(name), expected)


@pytest.mark.filterwarnings("ignore:Only .* survives rounding")
def test_small_edits_do_not_get_lost_in_rounding() -> None:
    """Forty changes of an eighth of a bfloat16 step each make five steps, not none."""
    optimizer = _optimizer(torch.bfloat16)
    with torch.no_grad():
        optimizer.originals[NAMES[0]].fill_(1.0)
        optimizer.model.get_parameter(NAMES[0]).fill_(1.0)
    step = 2.0**-7
    plain = torch.ones(SHAPE).bfloat16()
    for _ in range(40):
        _step(optimizer, WeightDelta({NAMES[0]: torch.full(SHAPE, step / 8)}))
        plain += step / 8
    expected = torch.full(SHAPE, 1 + 5 * step).bfloat16()
    assert torch.equal(optimizer.model.get_parameter(NAMES[0]), expected)
    assert torch.equal(plain, torch.ones(SHAPE).bfloat16())


def test_unannounced_parameters() -> None:
    optimizer = _optimizer()
    before = _weights(optimizer)
    optimizer.stage(WeightDelta({"model.norm.weight": torch.ones(32)}))
    with pytest.raises(
        EditError, match=r"changes model.norm.weight, which .* Announced: model.lay"
    ):
        optimizer.step()
    assert _same(_weights(optimizer), before)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_interruption_leaves_the_last_committed_state(
    failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = _optimizer()
    _step(optimizer, _edit(0))
    committed = _weights(optimizer)
    optimizer.stage(_edit(1))
    written: list[Change] = []

    def failing(parameter: Tensor, change: Change) -> Tensor:
        if len(written) == 2:
            monkeypatch.undo()
            assert not _same(_weights(optimizer), committed)
            raise failure
        written.append(change)
        return local_change(parameter, change)

    monkeypatch.setattr(delta_module, "local_change", failing)
    with pytest.raises(failure):
        optimizer.step()
    assert len(written) == 2 < len(NAMES)
    assert _same(_weights(optimizer), committed)
    assert optimizer.delta.provenance.request_ids == ("r0",)
    optimizer.step()  # the edit is still staged
    other = _optimizer()
    _step(other, _edit(0), _edit(1))
    assert _same(_weights(optimizer), _weights(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Only .* survives rounding")
def test_resuming_gives_the_same_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    edits = [_edit(0), _edit(1, NAMES[0]), _edit(2, is_dense=True), _edit(3)]
    whole = _optimizer(dtype)
    _step(whole, *edits)
    for stop in range(len(edits) + 1):
        first = _optimizer(dtype)
        _step(first, *edits[:stop])
        torch.save(first.state_dict(), tmp_path / "state.pt")
        weights = _weights(first)

        second = _optimizer(dtype)
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        with torch.no_grad():
            for name, parameter in second.model.named_parameters():
                parameter.copy_(weights[name])
        assert second.delta.provenance.request_ids == tuple(f"r{i}" for i in range(stop))
        _step(second, *edits[stop:])
        assert _same(_weights(second), _weights(whole))
        assert second.delta.norms() == whole.delta.norms()


def test_state_dict_round_trip() -> None:
    optimizer = _optimizer()
    _step(optimizer, _edit(0, NAMES[0]), _edit(1, NAMES[1], is_dense=True))
    state = optimizer.state_dict()
    assert set(state["delta"]) == {f"{NAMES[0]}.u", f"{NAMES[0]}.v", f"{NAMES[1]}.dense"}
    assert (state["state"], state["param_groups"]) == ({}, [])
    other = _optimizer()
    other.load_state_dict(copy.deepcopy(state))
    for name in NAMES[:2]:
        assert type(other.delta.changes[name]) is type(optimizer.delta.changes[name])
        assert torch.equal(other.delta.dense(name), optimizer.delta.dense(name))
    empty = _optimizer()
    empty.load_state_dict(_optimizer().state_dict())
    assert len(empty.delta) == 0


def test_rewind() -> None:
    optimizer = _optimizer()
    states = [_weights(optimizer)]
    deltas = [optimizer.delta]
    for seed in range(3):
        _step(optimizer, _edit(seed, NAMES[seed]))
        states.append(_weights(optimizer))
        deltas.append(optimizer.delta)
    for i in (2, 1, 3, 0):
        optimizer.rewind(deltas[i])
        assert _same(_weights(optimizer), states[i])
    _step(optimizer, _edit(0, NAMES[0]))
    optimizer.rewind()
    assert _same(_weights(optimizer), states[0])
    assert len(optimizer.delta) == 0


def test_other_parameters_are_left_alone() -> None:
    optimizer = _optimizer()
    with torch.no_grad():
        optimizer.model.get_parameter("model.norm.weight").fill_(7)
    _step(optimizer, _edit(0))
    optimizer.rewind()
    assert optimizer.model.get_parameter("model.norm.weight").eq(7).all()
    [group] = optimizer.param_groups
    names = {id(p): n for n, p in optimizer.model.named_parameters()}
    assert {names[id(p)] for p in group["params"]} == set(NAMES)


# -- what a method carries from edit to edit ---------------------------------------------------


def _counted(count: int) -> WeightDelta:
    edit = _edit(count)
    edit.carried = {"count": torch.tensor(count), "first": torch.tensor(1)}
    return edit


def test_a_step_takes_over_what_the_edit_carries_and_rewinding_gives_it_back() -> None:
    optimizer = _optimizer()
    assert optimizer.delta.carried == {}
    optimizer.stage(_counted(1))
    assert optimizer.delta.carried == {}  # staged is not committed
    optimizer.step()
    early = optimizer.delta
    _step(optimizer, 0.5 * _counted(2))  # a callback may have scaled it
    assert optimizer.delta.carried == {"count": torch.tensor(2), "first": torch.tensor(1)}
    _step(optimizer, _edit(3))  # an edit that carries nothing forgets nothing
    assert int(optimizer.delta.carried["count"]) == 2
    optimizer.rewind(early)
    assert int(optimizer.delta.carried["count"]) == 1
    optimizer.rewind()
    assert optimizer.delta.carried == {}


def test_what_is_carried_comes_back_with_a_checkpoint(tmp_path: Path) -> None:
    optimizer = _optimizer()
    _step(optimizer, _counted(1), _counted(2))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = _optimizer()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.delta.carried == optimizer.delta.carried


def test_a_step_that_fails_takes_over_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = _optimizer()
    _step(optimizer, _counted(1))
    optimizer.stage(_counted(2))
    with monkeypatch.context() as patch:
        patch.setattr(WeightDelta, "write_", _interrupted_once(WeightDelta.write_))
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert int(optimizer.delta.carried["count"]) == 1


def _interrupted_once(write: Any) -> Any:
    calls: list[int] = []

    def interrupted(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        write(*args)

    return interrupted


class Touched(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Counts the numbers that operations read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, object] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += sum(t.numel() for t in tree_leaves((args, found)) if torch.is_tensor(t))
        return found


def test_a_late_edit_touches_as_many_numbers_as_an_early_one() -> None:
    layer = nn.Linear(300, 280, bias=False)
    optimizer = EditOptimizer(layer, {"weight": layer.weight.detach().clone()})
    counts = []
    for _ in range(64 * 2 + 6):
        edit = WeightDelta({"weight": LowRank(torch.randn(280, 1) / 1e4, torch.randn(300, 1))})
        optimizer.stage(edit)
        with Touched() as touched:
            optimizer.step()
            optimizer.delta.norm()
        counts.append(touched.count)
    # As far into a block of terms each, and between two growths.
    assert counts[68] == counts[132] < 25 * 280 * 300
