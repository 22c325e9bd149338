# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Training an editor on several processes gives the network, statistics included, of one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lightning_edit
from tests.distributed.editing import WAYS
from tests.distributed.learn import CASES, learn
from tests.distributed.matrix import asked_in, run_cases

pytestmark = pytest.mark.filterwarnings("ignore:.*The number of training batches:UserWarning")

# How far networks and figures may be from those of one process, relative to them. Under `ddp`
# gradients are summed in another order.
CLOSE = {"ddp": 1e-3, "FSDP2": 1e-6, "TP": 1e-3, "FSDP2+TP": 1e-3}
# The same where there is next to nothing to be relative to.
TINY = {"ddp": 1e-6, "FSDP2": 1e-9, "TP": 1e-6, "FSDP2+TP": 1e-6}


def marks_of(way: str, case: str) -> list[pytest.MarkDecorator]:
    """When a case runs: always, in `make test-distributed`, or in `make test-slow`."""
    if (way, case) == ("ddp", "mend"):
        return []
    is_variant = way != "ddp" and case in ("mend_together", "malmen_apart")
    return [pytest.mark.slow, *([pytest.mark.exhaustive] if "+" in way or is_variant else [])]


CELLS = [
    pytest.param(way, case, id=f"{way}-{case}", marks=marks_of(way, case))
    for way in CLOSE
    for case, (method, _) in CASES.items()
    if way in getattr(lightning_edit, method).strategies
]
Ran = tuple[list[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str, str], Ran]:
    """What several processes have in the end of a case, and what one has."""
    folder, asked = tmp_path_factory.mktemp("learned"), asked_in(request)

    @functools.cache
    def alone(case: str) -> dict[str, Tensor]:
        learn(case, folder / "one", "one", folder / "one")
        found: dict[str, Tensor] = load_file(folder / "one" / f"{case}-0.safetensors")
        return found

    @functools.cache
    def together(way: str) -> dict[str, str]:
        cases = [case for other, case in asked if other == way]
        for case in cases:
            alone(case)
        return run_cases(math.prod(WAYS[way]), learn, cases, folder / way, way, folder / "one")

    def of(way: str, case: str) -> Ran:
        said = together(way).get(case)
        if said is not None:
            pytest.fail(f"{case} under {way}: {said}", pytrace=False)
        count = math.prod(WAYS[way])
        files = [folder / way / f"{case}-{rank}.safetensors" for rank in range(count)]
        return [load_file(file) for file in files], alone(case)

    return of


def compare(way: str, case: str, ran: Callable[[str, str], Ran], *kinds: str) -> int:
    """Compares tensors whose names begin with one of these words; returns how many they are."""
    group, one = ran(way, case)
    judged = 0
    for name, tensor in one.items():
        if not name.startswith(kinds):
            continue
        if "val/" in name and case not in ("ke", "mend"):
            continue  # a validation judges by batches, of which a process has its share
        judged += 1
        for two in group:
            assert two.keys() == one.keys()
            assert torch.equal(two[name], group[0][name]), name  # every process knows the same
            error = torch.linalg.vector_norm((two[name] - tensor).float())
            assert error <= CLOSE[way] * torch.linalg.vector_norm(tensor.float()) + TINY[way], name
    return judged


@pytest.mark.parametrize(("way", "case"), CELLS)
def test_fit_learns_the_network_of_one_process(
    way: str, case: str, ran: Callable[[str, str], Any]
) -> None:
    assert compare(way, case, ran, "network.")
    assert compare(way, case, ran, "figures.")
    _, one = ran(way, case)
    assert float(one["figures.val/loss"]) > 0


@pytest.mark.parametrize(("way", "case"), CELLS)
def test_save_and_resume_end_as_without_an_interruption(
    way: str, case: str, ran: Callable[[str, str], Any]
) -> None:
    assert compare(way, case, ran, "from_own.")
    assert compare(way, case, ran, "from_one.")


@pytest.mark.parametrize(("way", "case"), CELLS)
def test_an_edit_is_that_of_one_process_and_is_reverted(
    way: str, case: str, ran: Callable[[str, str], Any]
) -> None:
    assert compare(way, case, ran, "edited.")
