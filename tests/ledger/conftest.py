# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What the tests of the ledger share: the packages that it needs, and a ledger of three edits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lightning_edit import ROME, Ledger
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer
from lightning_edit.ledger.signing import new_key

pytest.importorskip("sqlalchemy")


@pytest.fixture(scope="session")
def _written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger")
    new_key(folder / "key.pem")
    ledger = Ledger(folder / "ledger.db", who="anna", key=folder / "key.pem")
    editor = ROME.from_model(
        tiny_model(), tiny_tokenizer(), layers=[1], steps=2, cache_dir=str(folder / "cache")
    )
    with ledger.recording(editor, why="ticket 7"):
        for request in tiny_requests(3):
            editor.commit(editor.edit(request))
    return folder


@pytest.fixture
def written(_written: Path, tmp_path: Path) -> Path:
    """A folder with a signed ledger of three edits, ``ledger.db``, and its key, ``key.pem``."""
    return Path(shutil.copytree(_written, tmp_path / "written"))
