# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Training an editor on two processes gives the network, statistics included, of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.learn import CASES, learn, learn_and_save
from tests.processes import run_pair


@pytest.mark.filterwarnings("ignore:.*The number of training batches:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does(case: str, tmp_path: Path) -> None:
    run_pair(learn_and_save, case, tmp_path)
    first, second = (load_file(tmp_path / f"{case}-{rank}") for rank in range(2))
    one = learn(case, processes=1)
    assert first.keys() == second.keys() == one.keys()
    one_by_one = case in ("ke", "mend")
    for name, tensor in one.items():
        if name.startswith("val/") and not one_by_one:
            continue  # a validation judges by what a process has of a batch
        assert torch.equal(first[name], second[name]), name  # every process knows the same
        scale = float(tensor.abs().max())
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4 * scale + 1e-6)
    assert float(one["val/loss"]) > 0
