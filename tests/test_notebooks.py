# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Notebooks are their scripts, executed: the same cells, with outputs and without an error."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nbformat import NotebookNode

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
NAMES = ["comparison", "correction"]
# What a reader must find in the outputs.
SHOWN = {
    "comparison": ["LoRA", "compare.html", "text_before"],
    "correction": [
        "The capital of France is Paris",
        "The capital of France is Rome",
        "The capital of Germany is Berlin",
        "ticket KB-7",
        "reliability/autoregressive       0.00 → 1.00",
    ],
}


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(notebook: NotebookNode) -> str:
    found = []
    for cell in notebook.cells:
        for one in cell.get("outputs", []):
            assert one.output_type != "error", one
            found.append(str(one.get("text", "")))
            found.append(str(one.get("data", {}).get("text/plain", "")))
    return "\n".join(found)


def test_there_are_no_others() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_script_executed(builder: ModuleType, name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    script = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    made = [(cell.cell_type == "markdown", cell.source) for cell in notebook.cells]
    assert made == list(builder.cells(script))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    said = outputs(notebook)
    assert all(text in said for text in SHOWN[name])


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", NAMES)
def test_a_script_executes(builder: ModuleType, name: str) -> None:
    said = outputs(builder.build(FOLDER / f"{name}.py"))
    assert all(text in said for text in SHOWN[name])
