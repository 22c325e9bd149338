# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Attention of short rows gives what the models' own attention gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_edit.passes.attention import aligned_mask, short_attention
from tests import zoo

CPU = torch.device("cpu")


def logits_of(model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits[:, 2:]


@pytest.mark.parametrize("kind", zoo.DECODERS)
def test_models_say_the_same(kind: str) -> None:
    model = zoo.build(kind)
    wanted = logits_of(model)
    with short_attention(CPU, torch.float32):
        found = logits_of(model)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_half_precision_is_as_close_as_the_models_own(kind: str) -> None:
    model = zoo.build(kind)
    exact, own = logits_of(model), logits_of(model, torch.bfloat16)
    with short_attention(CPU, torch.bfloat16):
        found = logits_of(model, torch.bfloat16)
    assert (found - exact).norm() < 2 * (own - exact).norm() < 0.1 * exact.norm()


def test_keys_are_not_copied_for_every_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = zoo.build("llama"), []
    usual = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((query.shape, key.shape))
        return usual(query, key, *args, **kwargs)

    monkeypatch.setattr("lightning_edit.passes.attention.scaled_dot_product_attention", watched)
    with short_attention(CPU, torch.float32):
        logits_of(model)
    groups = model.config.num_key_value_heads
    share = model.config.num_attention_heads // groups
    assert share > 1
    assert len(seen) == zoo.LAYERS
    assert all(q[1] == k[1] == groups and q[2] == share * k[2] for q, k in seen)


def test_the_usual_attention_comes_back_whatever_happens() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def fail() -> None:
        with short_attention(CPU, torch.float32):
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not usual
            with short_attention(CPU, torch.float32):
                pass
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not usual
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
    ALL_ATTENTION_FUNCTIONS["sdpa"] = override = lambda *args, **kwargs: usual(*args, **kwargs)
    try:
        with short_attention(CPU, torch.float32):
            pass
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is override
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


@pytest.mark.parametrize("form", ["seen", "added"])
def test_a_mask_made_for_gpus_hides_the_same(form: str) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, n, 4) for n in (6, 11, 11))
    seen = (torch.rand(3, 1, 6, 11) < 0.5).index_fill(3, torch.tensor([0]), True)
    mask = seen if form == "seen" else torch.zeros(seen.shape).masked_fill(~seen, -1e9)
    made = aligned_mask(mask, torch.float32)
    assert made.shape == mask.shape
    assert made.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in made.stride()[:-1])
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(
        attend(query, key, value, attn_mask=made), attend(query, key, value, attn_mask=mask)
    )
