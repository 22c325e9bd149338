# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Two processes, with whole weights or with parts of them, forget as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_edit import SaveTaskVector, WeightDelta
from tests.callbacks.foreign import data_of, fit, foreign
from tests.distributed import forget
from tests.processes import run_pair


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_processes_forget_as_one(tmp_path: Path, strategy: str) -> None:
    fit(foreign(), data_of(old=True), SaveTaskVector(str(tmp_path / "vector")))
    run_pair(forget.run_and_save, tmp_path, strategy)
    one = forget.run(tmp_path, processes=1)
    first, second = (load_file(tmp_path / f"weights-{rank}") for rank in range(2))
    assert one.keys() == first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        # Two processes sum in another order.
        torch.testing.assert_close(tensor, one[name], rtol=0, atol=2e-5, msg=name)
    for kind in ("learned", "whole"):
        alone, shared = (WeightDelta.load(tmp_path / f"{kind}-{n}") for n in (1, 2))
        assert set(alone.changes) == set(shared.changes)
        assert (alone - shared).norm() < 1e-2 * alone.norm()
        assert alone.provenance.base == shared.provenance.base
