# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a comparison shows of its cells while it runs."""

from __future__ import annotations

import pytest

from lightning_edit.benchmark import progress
from lightning_edit.benchmark.progress import cell_progress


@pytest.mark.parametrize("shown", [True, False])
def test_without_a_terminal_lines_tell_where_a_cell_begins_and_ends(
    shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress, "rank_zero_info", lines.append)
    with cell_progress(3, 1, shown=shown) as bar:
        for name in ("ROME", "IKE"):
            bar.begin(name)
            bar.end(name, "done in 2 s")
    told = ["2 of 3  ROME …", "2 of 3  ROME  done in 2 s"]
    told += ["3 of 3  IKE …", "3 of 3  IKE  done in 2 s"]
    assert lines == (told if shown else [])
