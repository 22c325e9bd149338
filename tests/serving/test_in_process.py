# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Adapters in a model of one's own process, by peft: the edited model's logits, and the base's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_edit.artifacts import export
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ServerError
from lightning_edit.serving import Deployment, InProcess
from tests import zoo
from tests.artifacts.helpers import low_rank_edit, saved_base

pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    # transformers' own deprecation, called by peft
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.arange(2, 26).view(2, 12)).logits
    return logits


def test_versions_in_a_model(tmp_path: Path) -> None:
    model = zoo.build("llama")
    base = saved_base(model, tmp_path)
    deltas = [low_rank_edit(model, base), -0.5 * low_rank_edit(model, base)]
    deployment = Deployment(tmp_path / "served", "facts")
    wanted = []
    for i, delta in enumerate(deltas):
        delta.save(tmp_path / f"delta{i}")
        with delta.applied(model):
            wanted.append(_logits(model))

        def write(place: Path, _: str, source: str = str(tmp_path / f"delta{i}")) -> None:
            _export(source, place)

        deployment.add(write)
    before = _logits(model)
    server = InProcess(model)
    deployment.push(server, 1)
    torch.testing.assert_close(_logits(model), wanted[0], atol=1e-4, rtol=0)
    deployment.push(server, 2)
    torch.testing.assert_close(_logits(model), wanted[1], atol=1e-4, rtol=0)
    assert [(one.name, one.scale) for one in server.served()] == [("facts-v1", 0), ("facts-v2", 1)]
    deployment.undo(server)
    torch.testing.assert_close(_logits(model), wanted[0], atol=1e-4, rtol=0)
    assert [one.name for one in server.served()] == ["facts-v1"]
    deployment.pull(server)
    assert torch.equal(_logits(model), before)
    assert server.served() == []


def test_a_name_is_swapped_in_place(tmp_path: Path) -> None:
    model = zoo.build("llama")
    base = saved_base(model, tmp_path)
    delta = low_rank_edit(model, base)
    other = WeightDelta(dict(list(delta.changes.items())[:2]), delta.provenance)
    server = InProcess(model)
    tensors = []
    for i, one in enumerate((delta, 0.5 * delta, other)):
        one.save(tmp_path / f"delta{i}")
        _export(str(tmp_path / f"delta{i}"), tmp_path / f"lora{i}")
        server.push(tmp_path / f"lora{i}", "facts")
        server.prefer("facts")
        served = _logits(model)
        tensors.append(sum("lora_A" in name for name, _ in model.named_parameters()))
        server.prefer(None)
        with one.applied(zoo.build("llama")) as edited:
            torch.testing.assert_close(served, _logits(edited), atol=1e-4, rtol=0)
    assert tensors == [4, 4, 2]
    with pytest.raises(ServerError, match="does not fit"):
        server.push(tmp_path / "nowhere", "other")
    with pytest.raises(ServerError, match="has a dot in it"):
        server.push(tmp_path / "lora0", "a.b")
    assert server.fields("facts") == {}


def _export(source: str, place: Path) -> None:
    export(source, output=str(place), uniform=True)
