# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""LoRA factors are the change itself, or its best approximation of the rank asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_edit.core.change import Change, LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.lora import LoRAFactors, to_lora
from tests import zoo

O, I = 20, 30  # noqa: E741


def _low(rank: int, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(O, rank, generator=generator), torch.randn(I, rank, generator=generator)
    )


def _lora(change: Change, rank: int | None = None) -> LoRAFactors:
    return WeightDelta({"0.weight": change}).to_lora(nn.Sequential(nn.Linear(I, O)), rank)["0"]


def _product(factors: LoRAFactors) -> Tensor:
    return factors.b @ factors.a


def _best_error(matrix: Tensor, rank: int) -> float:
    """By NumPy: what the best approximation of a rank leaves out, as a share of the norm."""
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    return float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum()))


def test_low_rank_is_taken_over() -> None:
    change = _low(3)
    for rank in (None, 3, 50):
        factors = _lora(change, rank)
        assert factors.a.shape == (3, I)
        assert factors.b.shape == (O, 3)
        assert factors.rank == 3
        assert factors.relative_error == 0
        assert torch.equal(factors.b, change.u)
        assert torch.equal(factors.a, change.v.T)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("is_dense", [False, True])
def test_cutting_is_best(rank: int, is_dense: bool) -> None:
    low = _low(5)
    factors = _lora(low.dense() if is_dense else low, rank)
    assert factors.rank == rank
    best = _best_error(low.dense(), rank)
    assert factors.relative_error == pytest.approx(best, rel=1e-5)
    missing = torch.linalg.vector_norm(low.dense() - _product(factors))
    assert float(missing / torch.linalg.vector_norm(low.dense())) == pytest.approx(best, rel=1e-4)


def test_dense_of_small_rank_is_whole() -> None:
    dense = _low(4).dense()
    factors = _lora(dense)
    assert factors.rank == 4
    assert factors.relative_error < 1e-6
    torch.testing.assert_close(_product(factors), dense, atol=1e-5, rtol=1e-5)


def test_dense_of_full_rank_asks_for_a_rank() -> None:
    dense = torch.randn(O, I, generator=torch.Generator().manual_seed(0))
    half = next(rank for rank in range(O) if _best_error(dense, rank) <= 0.5)
    with pytest.raises(ArtifactError, match=rf"has the rank 20.*\(rank {half} leaves out half of"):
        _lora(dense)
    assert _lora(dense, 20).relative_error < 1e-6


def test_rank_larger_than_the_matrix() -> None:
    assert _lora(torch.eye(O, I), 1000).rank == O


@pytest.mark.parametrize("rank", [0, -1])
def test_wrong_rank(rank: int) -> None:
    with pytest.raises(ArtifactError, match=f"`rank` is expected to be at least 1, but got {rank}"):
        _lora(_low(1), rank)


def test_no_change_at_all() -> None:
    factors = _lora(torch.zeros(O, I))
    assert factors.rank == 1
    assert not _product(factors).any()
    assert factors.relative_error == 0


def test_transposed_weights() -> None:
    model = zoo.build("gpt2")
    name = "transformer.h.0.mlp.c_fc"
    change = LowRank(torch.ones(32, 1), torch.arange(128.0)[:, None])
    delta = WeightDelta({f"{name}.weight": change})
    [factors] = to_lora(delta.changes, model).values()
    assert factors.transposed
    assert factors.a.shape == (1, 32)
    assert factors.b.shape == (128, 1)
    torch.testing.assert_close(_product(factors), delta.dense(f"{name}.weight").T)


def test_the_weights_are_not_read() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(I, O))
    assert to_lora({"0.weight": _low(1)}, model)["0"].rank == 1


def test_what_lora_cannot_hold() -> None:
    model = zoo.build("gpt2")
    names = {
        "transformer.wte.weight": "Embedding",
        "transformer.h.0.ln_1.weight": "LayerNorm",
        "transformer.h.0.attn.c_attn.bias": "Conv1D",
        "transformer.h.0.mlp.c_fc.weight": "",
    }
    shapes = dict(model.named_parameters())
    delta = WeightDelta({name: torch.ones_like(shapes[name]) for name in names})
    with pytest.raises(ArtifactError, match="holds changes of the weights of linear maps") as error:
        delta.to_lora(model)
    for name, kind in names.items():
        assert (f"`{name}` ({kind})" in str(error.value)) == bool(kind)


def test_another_architecture() -> None:
    delta = WeightDelta({"0.weight": _low(1)})
    with pytest.raises(ArtifactError, match=r"`0.weight` of shape \[20, 30\].*does not exist in"):
        delta.to_lora(zoo.build("llama"))
    with pytest.raises(ArtifactError, match=r"has the shape \[30, 20\] in Sequential. Give the"):
        delta.to_lora(nn.Sequential(nn.Linear(O, I)))
