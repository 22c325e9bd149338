# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The reference in docs/reference names every public name once, and nothing that is not there."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lightning_edit

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """What mkdocs calls while it builds; no module of a package."""
    spec = importlib.util.spec_from_file_location("public_names", ROOT / "docs" / "public_names.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries(hook: ModuleType, text: str) -> list[str]:
    return re.findall(r"^::: (\S+)$", hook.on_page_markdown(text), re.MULTILINE)


def all_entries(hook: ModuleType) -> list[str]:
    return [name for page in PAGES for name in entries(hook, page.read_text(encoding="utf-8"))]


def test_every_public_name_has_one_entry(hook: ModuleType) -> None:
    found = Counter(all_entries(hook))
    assert set(found.values()) == {1}
    names = {f"lightning_edit.{name}" for name in set(lightning_edit.__all__) - {"__version__"}}
    assert names <= set(found), f"{names - set(found)} live in a room that has no page"


def test_entries_are_there_and_say_what_they_are(hook: ModuleType) -> None:
    for name in all_entries(hook):
        value: Any = pkgutil.resolve_name(name)
        assert inspect.getdoc(value), name


def test_names_come_with_the_bases_that_live_beside_them(hook: ModuleType) -> None:
    found = entries(hook, "# Metrics\n\n{{ metrics }}\n")
    assert found[:2] == ["lightning_edit.Fluency", "lightning_edit.Generality"]
    assert found[-3:] == [
        "lightning_edit.metrics.base.EditMetric",
        "lightning_edit.metrics.reading.ReadingMetric",
        "lightning_edit.metrics.base.CountingMetric",
    ]
    assert len(found) == len(set(found))


def test_a_home_without_names_is_refused(hook: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"`\{\{ modules.meta \}\}`: no public name lives in"):
        hook.expand("{{ modules.meta }}")


def test_the_first_page_names_the_others() -> None:
    index = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\((\w+\.md)\)", index))
    assert named == {page.name for page in PAGES} - {"index.md"}
