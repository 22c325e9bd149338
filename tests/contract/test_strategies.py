# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What editors declare of strategies is what pages say, what is tried, and what is not refused."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from lightning_edit import ROME
from lightning_edit.core.errors import EditError
from lightning_edit.modules.sharded import prepare_strategy
from tests.contract.enumeration import EDITORS, LEARNERS, quick_editor
from tests.distributed import editing, learn
from tests.distributed.editing import strategy_without_processes
from tests.distributed.test_editors import CELLS
from tests.distributed.test_learn import CELLS as LEARNED
from tests.modules.helpers import bare_trainer

ROOT = Path(__file__).parents[2]
EVERY = {**EDITORS, **LEARNERS}


class Undivided(ROME):
    """One that somebody has tried under `ddp` alone."""

    strategies: ClassVar[tuple[str, ...]] = ("ddp",)


class Sharded(ROME):
    """One that somebody has tried under FSDP2, too."""

    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2")


@pytest.fixture(scope="module")
def table() -> ModuleType:
    """What mkdocs calls while it builds; no module of a package."""
    spec = importlib.util.spec_from_file_location("strategies", ROOT / "docs" / "strategies.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_strategy_of_every_editor_is_tried(table: ModuleType) -> None:
    editors = [map(str, cell.values) for cell in CELLS]
    tried = {(editing.CASES[case][0], way) for way, case in editors}
    tried |= {(learn.CASES[case][0], way) for way, case in (map(str, c.values) for c in LEARNED)}
    declared = {(name, way) for name, ways in table.support().items() for way in ways}
    assert tried == declared
    assert {name for name, _ in declared} == EVERY.keys()


def test_the_page_has_a_mark_for_each_and_for_no_other(table: ModuleType) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    page = table.on_page_markdown(page)
    assert "{{" not in page
    marks: dict[str, tuple[str, ...]] = {}
    for names, *cells in re.findall(r"^\| (`.+`) " + r"\| (✓?) *" * 4 + r"\|$", page, re.MULTILINE):
        ways = [way for way, cell in zip(table.STRATEGIES, cells, strict=True) if cell]
        marks |= {name: tuple(ways) for name in re.findall(r"`(\w+)`", names)}
    assert marks == table.support()


def test_the_list_of_methods_agrees(table: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)`.*\| ✓ \| (✓?) ?\| (✓?) ?\|$", text, re.MULTILINE)
    said = {name: (bool(ddp), bool(sharded)) for name, ddp, sharded in rows}
    assert said == {
        name: ("ddp" in ways, "FSDP2" in ways)
        for name, ways in table.support().items()
        if name in said
    }
    assert {"ROME", "CaliNET", "SERAC"} <= said.keys()


def test_other_strategies_are_refused(subtests: pytest.Subtests) -> None:
    trainer: Any = bare_trainer()
    refused = 0
    for cls in (*EVERY.values(), Undivided, Sharded):
        editor = quick_editor(cls)
        for way, sizes in editing.WAYS.items():
            if way in ("one", "ddp"):
                continue
            trainer._accelerator_connector.strategy = strategy_without_processes(*sizes)
            with subtests.test(cls.__name__, way=way):
                if way in cls.strategies:
                    prepare_strategy(trainer, editor)
                    continue
                with pytest.raises(EditError, match=rf"{cls.__name__} (does not work|works with)"):
                    prepare_strategy(trainer, editor)
                refused += 1
    assert refused == 5
