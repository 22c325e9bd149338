# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a model is while it is borrowed, and that it is given back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_edit.passes import borrowing
from lightning_edit.passes.borrowing import borrowed


def made() -> Any:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 1))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model(torch.ones(1, 2)).sum().backward()
    return model


def state(model: nn.Module) -> list[Any]:
    return [
        *(module.training for module in model.modules()),
        *((p.requires_grad, p.grad) for p in model.parameters()),
    ]


@pytest.mark.parametrize("error", [None, OSError, KeyboardInterrupt])
def test_modes_flags_and_gradients_come_back(error: type[BaseException] | None) -> None:
    model = made()
    before = state(model)
    try:
        with borrowed(model, ["2.weight"]):
            assert not any(module.training for module in model.modules())
            assert [n for n, p in model.named_parameters() if p.requires_grad] == ["2.weight"]
            model(torch.ones(1, 2)).sum().backward()
            for parameter in model.parameters():
                parameter.grad = None
            model[1].train()
            with borrowed(model):
                assert not any(p.requires_grad for p in model.parameters())
            assert model[2].weight.requires_grad
            assert model[1].training
            if error is not None:
                raise error
    except (OSError, KeyboardInterrupt):
        pass
    assert state(model) == before


def test_parameters_that_took_the_place_of_others_get_their_flags() -> None:
    model = made()
    with borrowed(model):
        model[0].bias = nn.Parameter(torch.ones(2))  # as a strategy that shards does
        model[2].weight = nn.Parameter(torch.ones(1, 2), requires_grad=False)
    assert not model[0].bias.requires_grad
    assert model[2].weight.requires_grad


def test_a_memory_has_parameters_of_its_own() -> None:
    model = made()
    model.edit_memory = nn.Linear(2, 2)
    with borrowed(model):
        assert model.edit_memory.weight.requires_grad


def test_the_device_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one processor, by what is asked where the model is."""
    model = made()
    asked: list[torch.device] = []
    devices = iter([torch.device("cuda"), torch.device("cpu"), torch.device("cuda")])
    monkeypatch.setattr(borrowing, "_device_of", lambda _: next(devices, torch.device("cuda")))
    monkeypatch.setattr(model, "to", asked.append)
    with borrowed(model):
        pass
    assert asked == [torch.device("cuda")]


def test_under_inference_mode_flags_come_back_too() -> None:
    model = made()
    before = state(model)
    with torch.inference_mode(), borrowed(model, ["0.bias"]):
        assert model[0].bias.requires_grad
    assert state(model) == before
