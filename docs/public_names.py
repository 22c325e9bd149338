# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What mkdocs asks while it builds: fills pages of the reference in with public names.

A line such as ``{{ modules.fine_tuning }}`` stands for all public names that live there, and for
their bases there, so that a new method needs no line on a page of its own. Where names live is read
from ``lightning_edit/__init__.pyi``, and what they are from the sources.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

__all__ = ["expand", "homes", "on_page_markdown"]

PACKAGE = Path(__file__).parent.parent / "lightning_edit"
PLACE = re.compile(r"^\{\{ ([\w.]+) \}\}$", re.MULTILINE)


@cache
def homes() -> dict[str, str]:
    """Public names and the modules where they live, such as ``modules.base``."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    nodes = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    found = {alias.name: str(node.module) for node in nodes for alias in node.names}
    return {name: home for name, home in found.items() if not name.startswith("_")}


@cache
def classes() -> dict[str, tuple[str, tuple[str, ...]]]:
    """The module and the bases of every class of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                bases = (ast.unparse(base).partition("[")[0] for base in node.bases)
                found[node.name] = (module, tuple(bases))
    return found


def bases(names: list[str], home: str) -> list[str]:
    """Classes without a public name that some others are built on, the nearest first."""
    found: dict[str, None] = {}
    above = list(names)
    while above:
        _, bases = classes().get(above.pop(0), ("", ()))
        above += bases
        found |= {base: None for base in bases if base in classes() and base not in homes()}
    return [f"{classes()[base][0]}.{base}" for base in found if lives(classes()[base][0], home)]


def lives(module: str, home: str) -> bool:
    return f"{module}.".startswith(f"{home}.")


def expand(markdown: str) -> str:
    """Writes an entry for each public name in place of the line that stands for its home.

    Args:
        markdown: Text of a page.

    Returns:
        The text with lines such as ``::: lightning_edit.ROME``, which mkdocstrings reads.

    Raises:
        ValueError: If no public name lives where a line says.
    """

    def entries(match: re.Match[str]) -> str:
        home = match[1]
        names = [name for name, module in homes().items() if lives(module, home)]
        if not names:
            raise ValueError(f"`{match[0]}`: no public name lives in `lightning_edit.{home}`.")
        return "\n\n".join(f"::: lightning_edit.{name}" for name in names + bases(names, home))

    return PLACE.sub(entries, markdown)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs with the text of every page."""
    return expand(markdown)
