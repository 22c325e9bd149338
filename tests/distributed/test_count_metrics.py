# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Five rows on two processes count as five, on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_edit.functional import wilson_interval


def test_five_rows_on_two_processes(tmp_path: Path) -> None:
    script = Path(__file__).with_name("count_metrics.py")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", script, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
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
