# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Two processes that edit together leave one ledger, with each edit once."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_edit import Ledger
from lightning_edit.demos import tiny_requests
from tests.distributed.ledger import record
from tests.processes import run_pair

pytest.importorskip("sqlalchemy")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    pytest.mark.filterwarnings("ignore:EditReport has no metrics to report:UserWarning"),
]


def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    run_pair(record, tmp_path / "two")
    record(tmp_path / "one", processes=1)
    two, one = (Ledger(tmp_path / name / "ledger.db") for name in ("two", "one"))
    for ledger in (two, one):
        assert [(entry.kind, entry.request_ids) for entry in ledger.entries()] == [
            ("refused", ("again",)),
            ("edit", tuple(request.id for request in tiny_requests(2))),
            ("edit", (tiny_requests(3)[2].id,)),
        ]
        assert ledger.verify() == []
    before = [ledger.entry(1).before for ledger in (two, one)]
    assert before[0] == before[1]
