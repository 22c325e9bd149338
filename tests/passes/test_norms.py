# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Norms that are run by one kernel give what the models' own give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_edit.passes.blocks import running
from lightning_edit.passes.norms import fused, fused_norms
from tests import zoo

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize(
    ("kind", "norms"), [("llama", 2), ("qwen3", 4), ("gemma2", 0), ("gpt2", 0)]
)
def test_models_say_the_same(kind: str, norms: int) -> None:
    model = zoo.build(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter))
    found = fused(model)
    # Gemma's multiply by one more than the weight, GPT-2's are no RMS norms.
    assert len(found) == norms * zoo.LAYERS + (norms > 0)
    wanted = model(input_ids=IDS).logits
    with running(found):
        logits = model(input_ids=IDS).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def test_processors_keep_their_own() -> None:
    model = zoo.build("llama")
    norm = next(m for m in model.modules() if type(m).__name__.endswith("RMSNorm"))
    with fused_norms(model):
        assert "forward" not in vars(norm)


def test_one_that_says_something_else_is_left_alone() -> None:
    class OddRMSNorm(nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0.1

    same, odd = nn.RMSNorm(4, eps=1e-6), OddRMSNorm(4, eps=1e-6)
    assert list(fused(nn.ModuleList([same, odd]))) == [same]
