# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiers import mark_long

SHARED = Path(__file__).parent.parent.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that edit the default model come first: begun last, they would be waited for."""
    mark_long(items)
    long = {item.path for item in items if item.get_closest_marker("real")}
    items.sort(key=lambda item: item.path not in long)


def pytest_sessionfinish() -> None:
    """Processes of the tests end with them."""
    processes = sys.modules.get("tests.processes")
    if processes is not None:
        processes.end_server()


@pytest.fixture(autouse=True)
def _pinned() -> None:
    """Each test draws the same numbers, and hears Lightning, whatever ran before it.

    Where pytest listens later than Lightning is imported, that keeps its messages to itself.
    """
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").propagate = True


@pytest.fixture(scope="session")
def _loaded_default_model() -> tuple[Any, Any, str]:
    from lightning_edit.core.hashing import weight_hash
    from lightning_edit.models import load_model, load_tokenizer

    model = load_model("smollm2")
    return model, load_tokenizer("smollm2"), weight_hash(model)


@pytest.fixture
def default_model(_loaded_default_model: tuple[Any, Any, str]) -> Iterator[tuple[Any, Any]]:
    """The default model and its tokenizer, shared; a test that changes it must undo that."""
    from lightning_edit.core.hashing import weight_hash

    model, tokenizer, digest = _loaded_default_model
    model.requires_grad_(True)
    versions = [p._version for p in model.parameters()]
    yield model, tokenizer
    model.zero_grad()
    if [p._version for p in model.parameters()] != versions:
        assert weight_hash(model) == digest, "a test left its edit behind"


@pytest.fixture
def goldens() -> Path:
    """Folder of reference figures; tests are skipped where it is absent."""
    folder = SHARED / "goldens"
    if not folder.is_dir():
        pytest.skip("the folder of reference figures is not here")
    return folder
