# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Two processes, with whole weights or with parts of them, forget as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_edit import SaveTaskVector, WeightDelta
from tests.callbacks.foreign import data_of, fit, foreign
from tests.distributed import forget


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_processes_forget_as_one(tmp_path: Path, strategy: str) -> None:
    fit(foreign(), data_of(old=True), SaveTaskVector(str(tmp_path / "vector")))
    script = Path(forget.__file__)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(script, tmp_path, strategy),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
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
