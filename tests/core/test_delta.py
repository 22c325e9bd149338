# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits add up as matrices do, go into every kind of model, and come out bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_edit.core.change import Change, LowRank, add_changes
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.hashing import tensor_hash, weight_hash
from lightning_edit.core.locator import Locator
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.models import load_model
from tests import zoo

M, N = 12, 10


def _low(rank: int, seed: int = 0, rows: int = M, columns: int = N) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(n, rank, generator=generator) for n in (rows, columns))
    return LowRank(u, v)


def _delta(*changes: LowRank | Tensor, ids: tuple[str, ...] = ()) -> WeightDelta:
    return WeightDelta(
        {f"{i}.weight": change for i, change in enumerate(changes)}, Provenance(request_ids=ids)
    )


def _layers(n: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(*(nn.Linear(N, M, bias=False) for _ in range(n))).to(dtype)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor_hash(one[name]) == tensor_hash(other[name]) for name in one
    )


def _edit_of(model: nn.Module, seed: int = 0, size: float = 0.1) -> WeightDelta:
    """A low-rank change of every MLP's last projection, with its provenance."""
    changes = {}
    for i, site in enumerate(Locator().sites(model)):
        rows, columns = site.parameter(model).shape
        low = _low(1 + i, seed + i, rows, columns)
        changes[site.name] = LowRank(size * low.u, low.v)
    base = BaseModelInfo("tiny", None, "float32", weight_hash(model))
    return WeightDelta(changes, Provenance("ROME", base=base, request_ids=(f"r{seed}",)))


# -- algebra ---------------------------------------------------------------------------------


def test_sum_of_low_ranks_keeps_the_factors() -> None:
    total = _delta(_low(2, 0)) + _delta(_low(3, 1))
    change = total.changes["0.weight"]
    assert isinstance(change, LowRank)
    assert change.rank == 5
    torch.testing.assert_close(total.dense("0.weight"), _low(2, 0).dense() + _low(3, 1).dense())


@pytest.mark.parametrize(("ranks", "kind"), [((2, 3), LowRank), ((3, 3), Tensor)])
def test_sum_is_dense_when_that_is_smaller(ranks: tuple[int, int], kind: type) -> None:
    total = _delta(_low(ranks[0])) + _delta(_low(ranks[1], 1))
    change = total.changes["0.weight"]
    assert isinstance(change, kind)
    expected = _low(ranks[0]).dense() + _low(ranks[1], 1).dense()
    torch.testing.assert_close(total.dense("0.weight"), expected)


def test_a_sum_of_many_edits_has_the_bits_of_one_made_at_once_and_costs_the_last_block() -> None:
    one = [LowRank(torch.randn(600, 1), torch.randn(500, 1)) for _ in range(200)]
    total: Change = one[0]
    for change in one[1:]:
        total = add_changes(total, change)
        if isinstance(total, LowRank) and total.rank % 50 == 0:
            total.dense()
    assert isinstance(total, LowRank)
    at_once = LowRank(total.u.clone(), total.v.clone())
    assert torch.equal(total.dense(), at_once.dense())
    torch.testing.assert_close(total.dense(), total.u @ total.v.T, rtol=1e-5, atol=1e-4)

    more = add_changes(total, one[0])
    assert isinstance(more, LowRank)
    with FlopCounterMode(display=False) as counter:
        more.dense()
    assert counter.get_total_flops() <= 2 * 600 * 500 * 64  # and not of all 201 terms
    assert torch.equal(total.dense(), at_once.dense())  # an earlier sum stays what it was


def test_sum_with_a_dense_change() -> None:
    dense = torch.ones(M, N)
    for total in (_delta(_low(1)) + _delta(dense), _delta(dense) + _delta(_low(1))):
        torch.testing.assert_close(total.changes["0.weight"], _low(1).dense() + dense)
    assert torch.equal(dense, torch.ones(M, N))


def test_sum_over_different_parameters() -> None:
    one = WeightDelta({"a": _low(1)}, Provenance("ROME", request_ids=("x", "y")), {"a": _low(1).u})
    two = WeightDelta({"b": _low(2)}, Provenance("MEMIT", request_ids=("y", "z")), {"b": _low(2).u})
    total = one + two
    assert list(total.changes) == ["a", "b"]
    assert total.changes["b"] is two.changes["b"]
    assert total.provenance.request_ids == ("x", "y", "z")
    assert total.originals.keys() == {"a", "b"}
    assert list(one.changes) == ["a"]


def test_the_earlier_originals_count() -> None:
    one = WeightDelta({"a": _low(1)}, originals={"a": torch.zeros(M, N)})
    two = WeightDelta({"a": _low(1)}, originals={"a": torch.ones(M, N)})
    assert torch.equal((one + two).originals["a"], torch.zeros(M, N))


def test_scaling_and_difference() -> None:
    delta = _delta(_low(2), torch.ones(M, N))
    for scaled in (delta * -3, -3 * delta):
        torch.testing.assert_close(scaled.dense("0.weight"), -3 * _low(2).dense())
        torch.testing.assert_close(scaled.dense("1.weight"), torch.full((M, N), -3.0))
    assert (delta * 0.5).norm() == pytest.approx(0.5 * delta.norm())
    assert (delta - delta).norm() == pytest.approx(0, abs=1e-5)
    assert torch.equal((-delta).dense("1.weight"), -torch.ones(M, N))


def test_norms_by_hand() -> None:
    delta = _delta(LowRank(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0]])), torch.ones(1, 4))
    assert delta.norms() == {"0.weight": pytest.approx(10), "1.weight": pytest.approx(2)}
    assert delta.norm() == pytest.approx(math.sqrt(104))
    assert delta.nbytes == 4 * (2 + 1 + 4)
    assert WeightDelta({}).norm() == 0
    assert len(delta) == 2
    assert repr(delta) == "WeightDelta(0.weight: rank 1, 1.weight: dense)"


# -- task vectors ----------------------------------------------------------------------------


def test_between_two_models() -> None:
    base, tuned = zoo.build("gpt2"), zoo.build("gpt2")
    name = "transformer.h.1.mlp.c_fc.weight"
    with torch.no_grad():
        tuned.get_parameter(name)[3] += 1
        tuned.transformer.ln_f.bias.mul_(2)
    delta = WeightDelta.between(_weights(base), _weights(tuned))
    assert delta.changes.keys() == {name, "transformer.ln_f.bias"}
    expected = torch.zeros(32, 128)
    expected[3] = 1
    torch.testing.assert_close(delta.dense(name), expected)
    before = _weights(base)
    delta.apply_(base)
    for parameter, wanted in zip(base.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted)
    delta.revert_(base)
    assert _same(_weights(base), before)


def test_between_knows_tied_weights() -> None:
    base, tuned = zoo.build("gpt2"), zoo.build("gpt2")
    with torch.no_grad():
        tuned.transformer.wte.weight.mul_(1.5)
    delta = WeightDelta.between(base.state_dict(), tuned.state_dict())
    assert list(delta.changes) == ["transformer.wte.weight"]
    delta.apply_(base)
    torch.testing.assert_close(base.lm_head.weight, tuned.lm_head.weight)


def test_between_tells_that_tied_weights_were_untied() -> None:
    base, tuned = zoo.build("gpt2"), zoo.build("gpt2")
    before, after = base.state_dict(), tuned.state_dict()
    after["lm_head.weight"] = after["lm_head.weight"].clone()
    assert not WeightDelta.between(before, after).changes  # two tensors that say the same
    after["lm_head.weight"][0] += 1
    message = r"`transformer.wte.weight` and `lm_head.weight` are one tensor in the base and two"
    with pytest.raises(ArtifactError, match=message):
        WeightDelta.between(before, after)


def test_between_subtracts_in_float32() -> None:
    before = torch.full((2, 2), 256.0).bfloat16()
    after = torch.full((2, 2), 258.0).bfloat16()
    change = WeightDelta.between({"a": before}, {"a": after}).changes["a"]
    assert isinstance(change, Tensor)
    assert change.dtype == torch.float32
    assert torch.equal(change, torch.full((2, 2), 2.0))


@pytest.mark.parametrize("other", [{}, {"a": torch.zeros(3)}])
def test_between_different_architectures(other: dict[str, Tensor]) -> None:
    with pytest.raises(ArtifactError, match=r"`a` of the tuned model has no counterpart.*\[2\]"):
        WeightDelta.between(other, {"a": torch.zeros(2)})


# -- into a model and out again --------------------------------------------------------------


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Only .* survives rounding")
def test_apply_and_revert_are_exact(kind: str, dtype: torch.dtype) -> None:
    model = zoo.build(kind).to(dtype)
    delta, before = _edit_of(model), _weights(model)
    delta.apply_(model)
    after = _weights(model)
    for name, tensor in after.items():
        if name not in delta.changes:
            assert torch.equal(tensor, before[name])
            continue
        change = delta.changes[name]
        assert isinstance(change, LowRank)
        wanted = before[name].float() + change.u @ change.v.T
        assert torch.equal(tensor, wanted.to(dtype))
        assert not torch.equal(tensor, before[name])
    delta.revert_(model)
    assert _same(_weights(model), before)


@pytest.mark.parametrize("kind", zoo.DECODERS)
def test_exact_undo_of_a_saved_model(kind: str, tmp_path: Path) -> None:
    model = zoo.build(kind)
    before = _weights(model)
    delta = _edit_of(model)
    delta.apply_(model)
    delta.seal(model, delta.originals).save(tmp_path / "delta")
    model.save_pretrained(tmp_path / "edited")

    edited = load_model(str(tmp_path / "edited"))
    assert weight_hash(edited) != delta.provenance.base.sha256
    loaded = WeightDelta.load(tmp_path / "delta")
    loaded.revert_(edited)
    assert weight_hash(edited) == delta.provenance.base.sha256
    assert _same(_weights(edited), before)
    loaded.apply_(edited)
    assert _same(_weights(edited), _weights(model))


def test_undo_is_exact_where_subtraction_is_not() -> None:
    model = _layers(dtype=torch.bfloat16)
    before = _weights(model)
    delta = _delta(torch.full((M, N), 1.0))
    with delta.applied(model):
        subtracted = model[0].weight - torch.ones(M, N).bfloat16()
        assert not torch.equal(subtracted, before["0.weight"])
    assert _same(_weights(model), before)


def test_reverted_and_applied_blocks() -> None:
    model = _layers()
    before, delta = _weights(model), _delta(_low(2))
    with pytest.raises(KeyError), delta.applied(model):
        raise KeyError
    assert _same(_weights(model), before)
    delta.apply_(model)
    after = _weights(model)
    with delta.reverted(model):
        assert _same(_weights(model), before)
    assert _same(_weights(model), after)
    with pytest.raises(KeyError), delta.reverted(model):
        raise KeyError
    assert _same(_weights(model), after)


def test_reverted_beside_another_edit() -> None:
    model = zoo.build("llama")
    base = BaseModelInfo(sha256=weight_hash(model))
    sites = [site.name for site in Locator().sites(model)]
    parts = [
        WeightDelta({name: _edit_of(model).changes[name]}, Provenance(base=base))
        for name in sites[:2]
    ]
    parts[0].apply_(model)
    parts[1].apply_(model, check=False)
    after = _weights(model)
    with parts[0].reverted(model):
        assert not _same(_weights(model), after)
    assert _same(_weights(model), after)


def test_small_edits_are_warned_of() -> None:
    model = _layers(dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"Only .* of the change of `0.weight` survives rounding"):
        _delta(torch.full((M, N), 1e-6)).apply_(model)


# -- refusals, after which the model is as it was --------------------------------------------


def test_wrong_base() -> None:
    model, other = zoo.build("llama"), zoo.build("llama", seed=1)
    delta, before = _edit_of(model), _weights(other)
    with pytest.raises(ArtifactError, match=r"belongs to tiny with the weight hash .*another mod"):
        delta.apply_(other)
    assert _same(_weights(other), before)
    delta.apply_(other, check=False)
    delta.revert_(other)
    assert _same(_weights(other), before)


def test_applying_twice() -> None:
    model = zoo.build("llama")
    delta = _edit_of(model)
    delta.apply_(model)
    after = _weights(model)
    with pytest.raises(ArtifactError, match="it has been edited already"):
        delta.apply_(model)
    assert _same(_weights(model), after)


def test_wrong_dtype() -> None:
    delta = _edit_of(zoo.build("llama"))
    with pytest.raises(ArtifactError, match="loaded as float32 and this model as bfloat16: load"):
        delta.apply_(zoo.build("llama").bfloat16())


def test_missing_parameter() -> None:
    model = _layers()
    before = _weights(model)
    delta = _delta(_low(1), _low(1))
    with pytest.raises(ArtifactError, match=r"no parameter `1.weight`.* for another model"):
        delta.apply_(model)
    assert _same(_weights(model), before)


def test_wrong_shape() -> None:
    model = _layers(2)
    before = _weights(model)
    delta = _delta(_low(1), _low(1, rows=M + 1))
    delta.provenance = Provenance(base=BaseModelInfo(id="acme/tiny"))
    with pytest.raises(ArtifactError, match=r"shape \[12, 10\].* for \[13, 10\].* for acme/tiny"):
        delta.apply_(model)
    assert _same(_weights(model), before)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError, torch.OutOfMemoryError])
def test_an_interrupted_apply_leaves_the_model(
    failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _layers(3)
    before, delta = _weights(model), _delta(_low(1), _low(2), _low(3))
    dense = LowRank.dense
    calls = []

    def failing(self: LowRank) -> Tensor:
        calls.append(self.rank)
        if self.rank == 3:
            assert not torch.equal(model[0].weight, before["0.weight"])
            raise failure
        return dense(self)

    monkeypatch.setattr(LowRank, "dense", failing)
    with pytest.raises(failure):
        delta.apply_(model)
    assert calls == [1, 2, 3]
    assert _same(_weights(model), before)
    assert delta.originals == {}


def test_revert_without_originals(tmp_path: Path) -> None:
    model = _layers()
    delta = _delta(_low(1))
    with pytest.raises(ArtifactError, match=r"originals of 0.weight were not kept"):
        delta.revert_(model)
    delta.apply_(model)
    loaded = WeightDelta.load(delta.save(tmp_path / "delta", originals=False))
    with pytest.raises(ArtifactError, match=r"save edits with their originals"):
        loaded.revert_(model)


def _sealed(model: nn.Module, delta: WeightDelta) -> WeightDelta:
    originals = _weights(model)
    delta.apply_(model)
    return delta.seal(model, originals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_revert_where_another_edit_came_after(dtype: torch.dtype) -> None:
    model = _layers(dtype=dtype)
    base = _weights(model)
    first = _sealed(model, _delta(_low(1)))
    between = _weights(model)
    second = _sealed(model, _delta(torch.full((M, N), 0.02)))
    after = _weights(model)
    with pytest.raises(ArtifactError, match=r"another change came after it. Undo later edits fir"):
        first.revert_(model)
    assert _same(_weights(model), after)
    second.revert_(model)
    assert _same(_weights(model), between)
    first.revert_(model)
    assert _same(_weights(model), base)
    with pytest.raises(ArtifactError, match="the edit is not applied here"):
        first.revert_(model)


def test_one_step_of_one_weight_is_a_later_edit() -> None:
    model = _layers(dtype=torch.bfloat16)
    sealed = _sealed(model, _delta(_low(1)))
    with torch.no_grad():
        weight = model[0].weight
        weight[2, 3] = torch.nextafter(weight[2, 3], torch.tensor(9.0).bfloat16())
    with pytest.raises(ArtifactError, match="another change came after it"):
        sealed.revert_(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "scale"), [(64, 1.0), (3, 0.1)])  # with weights above the sum
def test_revert_of_what_another_machine_wrote(dtype: torch.dtype, rank: int, scale: float) -> None:
    change = _low(rank, rows=M, columns=N)
    change = LowRank(scale * change.u, change.v)
    model = _layers(dtype=dtype)
    before = _weights(model)
    sealed = _sealed(model, _delta(change))
    other = _layers(dtype=dtype)
    backwards = change.u.flip(1) @ change.v.flip(1).T  # the same terms in another order
    assert not torch.equal(backwards, change.dense())
    with torch.no_grad():
        other[0].weight.copy_((before["0.weight"].float() + backwards).to(dtype))
    sealed.revert_(other)
    assert _same(_weights(other), before)


def test_revert_in_another_dtype() -> None:
    model = _layers(dtype=torch.bfloat16)
    sealed = _sealed(model, _delta(_low(1)))
    with pytest.raises(ArtifactError, match=r"it is float32, and the edit wrote bfloat16. Load"):
        sealed.revert_(model.float())


def test_seal_keeps_copies() -> None:
    model = _layers()
    originals = _weights(model)
    delta = _delta(_low(1))
    delta.write_(model, originals)
    sealed = delta.seal(model, originals)
    hashes = (tensor_hash(originals["0.weight"]), tensor_hash(model[0].weight))
    assert sealed.hashes == {"0.weight": hashes}
    originals["0.weight"].zero_()
    sealed.revert_(model)
    assert tensor_hash(model[0].weight) == hashes[0]


# -- sharded weights -------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Only .* survives rounding")
def test_sharded_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = zoo.build("llama").to(dtype)
    delta = _edit_of(plain)
    wanted = zoo.build("llama").to(dtype)
    _edit_of(plain).apply_(wanted)

    model: Any = zoo.build("llama").to(dtype)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    delta.apply_(model)
    assert weight_hash(model) == weight_hash(wanted)
    delta.seal(model, originals).save(tmp_path / "delta")
    delta.revert_(model)
    assert weight_hash(model) == weight_hash(plain)

    loaded = WeightDelta.load(tmp_path / "delta")
    loaded.apply_(model)
    loaded.revert_(model)
    assert weight_hash(model) == weight_hash(plain)
    wanted_again = WeightDelta.load(tmp_path / "delta")
    wanted_again.revert_(wanted)
    assert weight_hash(wanted) == weight_hash(plain)


def test_subclasses_stay_themselves(tmp_path: Path) -> None:
    class Vector(WeightDelta):
        @classmethod
        def load(cls, folder: str | Path) -> Self:
            return super().load(folder)

    vector = Vector(_delta(_low(1)).changes)
    assert type(2 * vector + vector) is Vector
    assert type(Vector.load(vector.save(tmp_path / "delta"))) is Vector


def test_a_saved_edit_on_another_base(tmp_path: Path) -> None:
    model, other = _layers(), _layers()
    _sealed(model, _delta(_low(1))).save(tmp_path / "delta")
    with torch.no_grad():
        other[0].weight.mul_(2)
    before = _weights(other)
    loaded = WeightDelta.load(tmp_path / "delta")
    with loaded.applied(other):
        assert not _same(_weights(other), before)
    assert _same(_weights(other), before)


def test_an_edit_out_of_a_file_is_added_to_one_on_another_device() -> None:
    computed = WeightDelta({"w": LowRank(torch.ones(9, 1), torch.ones(9, 1)), "d": torch.ones(2)})
    elsewhere = WeightDelta(
        {
            "w": LowRank(*(torch.ones(9, 1, device="meta") for _ in range(2))),
            "d": torch.ones(2, device="meta"),
        }
    )
    total = elsewhere + computed
    low = total.changes["w"]
    assert isinstance(low, LowRank)
    assert low.u.device.type == low.v.device.type == "meta"
    assert total.dense("d").device.type == "meta"


def test_mixed_precision_does_not_round_low_rank_changes() -> None:
    change = LowRank(torch.randn(8, 2), torch.randn(6, 2))
    wanted = change.dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (change.u @ change.v.T).dtype == torch.bfloat16
        assert torch.equal(change.dense(), wanted)
