# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Executes the scripts in this folder into notebooks, outputs included.

``python examples/notebooks/build.py [NAME]...``. A script is what is edited and checked; the
notebook beside it is made. Cells begin with ``# %%``, those of text with ``# %% [markdown]``. Needs
the extra ``notebooks``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbclient import NotebookClient

__all__ = ["Cell", "build", "cells"]

FOLDER = Path(__file__).parent
MARK = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


class Cell(NamedTuple):
    """A cell of a notebook.

    Args:
        is_text: Whether it is Markdown.
        source: What stands in it.
    """

    is_text: bool
    source: str


def cells(script: str) -> Iterator[Cell]:
    r"""The cells of a script; what stands before the first is the script's own.

    Examples:
        >>> list(cells('"Own."\n# %% [markdown]\n# # Title\n# %%\n1 + 1\n'))
        [Cell(is_text=True, source='# Title'), Cell(is_text=False, source='1 + 1')]
    """
    _, *parts = MARK.split(script)
    for kind, body in zip(parts[::2], parts[1::2], strict=True):
        if kind:
            yield Cell(True, re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        else:
            # What only checkers read.
            yield Cell(False, re.sub(r"  # (type: ignore|noqa).*", "", body.strip()))


def build(script: Path, *, timeout: int = 900) -> nbformat.NotebookNode:
    """Executes a script as a notebook.

    Args:
        script: The script.
        timeout: Seconds that a cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    made = nbformat.v4.new_notebook()
    for i, cell in enumerate(cells(script.read_text(encoding="utf-8"))):
        new = nbformat.v4.new_markdown_cell if cell.is_text else nbformat.v4.new_code_cell
        made.cells.append(new(cell.source, id=f"cell-{i}"))
    NotebookClient(made, timeout=timeout, kernel_name="python3", record_timing=False).execute()
    for cell in made.cells:
        # Warnings and bars are of the machine, not of what is shown.
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    return made


def main(names: Sequence[str]) -> None:
    """Writes the notebooks of these scripts, or of all."""
    scripts = sorted(path for path in FOLDER.glob("*.py") if path.name != Path(__file__).name)
    for script in scripts:
        if not names or script.stem in names:
            nbformat.write(build(script), script.with_suffix(".ipynb"))
            sys.stdout.write(f"Wrote {script.with_suffix('.ipynb')}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
