# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Training an editor on two processes gives the network, statistics included, of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.learn import CASES, learn, learn_and_save, learn_in_parts
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*The number of training batches:UserWarning")
def test_networks_are_trained_beside_divided_weights(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    learn_in_parts(tuple(CASES), tmp_path, 1)
    run_pair(learn_in_parts, tuple(CASES), tmp_path, 2)
    for case in CASES:
        with subtests.test(case):
            one = load_file(tmp_path / f"{case}-1-0")
            one_by_one = case in ("ke", "mend")
            for rank in range(2):
                two = load_file(tmp_path / f"{case}-2-{rank}")
                assert {name.removeprefix("from_2.") for name in two} == set(one)
                for name, tensor in two.items():
                    if "val/" in name and not one_by_one:
                        continue  # a validation judges by batches, which hold the requests of all
                    whole = one[name.removeprefix("from_2.")]
                    error = torch.linalg.vector_norm((tensor - whole).float())
                    assert error <= 1e-6 * torch.linalg.vector_norm(whole.float()) + 1e-9, name
