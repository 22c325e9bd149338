# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Five rows on two processes count as five, on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_edit.functional import wilson_interval
from tests.distributed.count_metrics import count
from tests.processes import run_pair


def test_five_rows_on_two_processes(tmp_path: Path) -> None:
    run_pair(count, tmp_path)
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rank, result in enumerate(results):
        assert (result["value"], result["n"]) == (0.8, 5)
        assert result["interval"] == pytest.approx(wilson_interval(0.8, 5))
        assert result["local_n"] == (3, 2)[rank]
        # Rank 1 has no rows of this one.
        assert (result["idle_value"], result["idle_n"]) == (1.0, 3)
        assert result["score"] == pytest.approx(3 / (1 / 0.8 + 1 / 0.8 + 1 / 0.5))
        assert result["locality"] == 0.8
        # One more wrong row on each rank: 4 of 7. Nothing was counted twice by computing.
        assert result["value_later"] == pytest.approx(4 / 7)
