# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What mkdocs asks while it builds: a page a method, of its docstring, preset and measured rows.

A page is written by nobody, so that it never says what is no longer so: words come from the class,
settings from ``configs/method``, figures from the tables of other pages. The section
``Methods`` of the navigation gets all of them, and ``{{ list of methods }}`` a table with links.
``python docs/methods.py ROME`` prints one.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

import lightning_edit
from lightning_edit.artifacts.catalog import offers
from lightning_edit.presets import config_folder

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

__all__ = ["Measured", "measured", "method_page", "on_config", "on_files", "on_page_markdown"]

DOCS = Path(__file__).parent
PLACE = "{{ list of methods }}"
SECTION = "Methods"
# Where tables of measured rates stand.
PAGES = (
    "results/package_facts.md",
    "results/counterfact.md",
    "results/zsre.md",
    "results/sequences.md",
    "measured.md",
    "memory_editors.md",
    "hypernetworks.md",
    "compare.md",
)


class Measured(NamedTuple):
    """Rows of one measured table.

    Args:
        page: Where it stands, such as ``measured.md``.
        heading: Of the section.
        words: What stands in bold letters above the table, which tells it from its neighbors.
        head: The table's two first lines.
        rows: Those of the method.
    """

    page: str
    heading: str
    words: str
    head: str
    rows: tuple[str, ...]


@cache
def configurations() -> dict[str, list[str]]:
    """Method to its configurations, such as ``method/ft_l``."""
    folder = config_folder()
    found: dict[str, list[str]] = {offer.name: [] for offer in offers("methods")}
    for path in sorted((folder / "method").rglob("*.yaml")):
        section = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        method = section["class_path"].rpartition(".")[2]
        # What a trained editor is trained with says its own name in its file's.
        named = [name for name in found if name.lower() == path.stem.replace("_", "")]
        found[named[0] if named else method].append(
            path.relative_to(folder).with_suffix("").as_posix()
        )
    return found


def measured(method: str) -> list[Measured]:
    """All measured rows of a method.

    Args:
        method: Name of its class.
    """
    forms = (name.rpartition("/")[2].upper().replace("_", "-") for name in configurations()[method])
    named = "|".join(map(re.escape, (method, *forms)))
    return [
        one for page in PAGES for one in _rows(page, re.compile(rf"\| (`{method}`|({named}) \|)"))
    ]


def _rows(page: str, named: re.Pattern[str]) -> Iterator[Measured]:
    heading = words = ""
    table: list[str] = []
    for line in [*(DOCS / page).read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        rows = tuple(row for row in table[2:] if named.match(row))
        if rows and "reliability" in table[0]:
            yield Measured(page, heading, words, "\n".join(table[:2]), rows)
        table = []
        if line.startswith("#"):
            heading, words = line.lstrip("# "), ""
        elif bold := re.match(r"\*\*(.+?)\*\*", line):
            words = bold[1]


def method_page(method: str) -> str:
    """A method's page in Markdown.

    Args:
        method: Name of its class.
    """
    return "\n\n".join(_parts(method)) + "\n"


def _parts(method: str) -> Iterator[str]:
    [offer] = [one for one in offers("methods") if one.name == method]
    cls = getattr(lightning_edit, method)
    words = re.split(r"^(?:Args|Raises|Returns|Examples):", inspect.getdoc(cls) or "", flags=re.M)
    yield f"# {method}"
    yield words[0].strip()
    yield (
        f"Paper: [{offer.paper.removeprefix('https://')}]({offer.paper}). All arguments: "
        f"[`{method}`][lightning_edit.{method}]. When to take it, and when another: "
        "[Which method when](../which_method.md)."
    )
    yield "## Settings"
    for name in configurations()[method]:
        path = config_folder() / f"{name}.yaml"
        yield f"`-c {name}`:\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```"
    yield "Where these differ from the class's own, and why: [Presets](../presets.md)."
    yield "## Measured"
    tables = measured(method)
    for page, heading, title, head, rows in tables:
        anchor = re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())
        where = f"[{heading}](../{page}#{anchor})" + (f", {title.lower()}" if title else "")
        # Links of a page lead elsewhere from here.
        own = [re.sub(r"\]\((?=[\w#])", f"](../{page if '(#' in row else ''}", row) for row in rows]
        yield f"{where}:\n\n" + "\n".join([head, *own])
    if tables:
        yield (
            "Two figures in a cell are teacher-forced and autoregressive; the command that each "
            "comes from stands beside its table."
        )
    else:
        yield "No table of it yet: [measure it](../compare.md) on your model."


def list_of_methods() -> str:
    """Markdown: a row for each method, with its page."""
    rows = [
        f"| [`{one.name}`](methods/{one.name}.md) | {one.summary} | "
        f"[{one.paper.rpartition('/')[2]}]({one.paper}) |"
        for one in offers("methods")
    ]
    return "| method | what it does | paper |\n|---|---|---|\n" + "\n".join(rows)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Called by mkdocs first: adds the pages to the navigation."""
    [section] = [part[SECTION] for part in config.nav or () if SECTION in part]
    section += [f"methods/{offer.name}.md" for offer in offers("methods")]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs with the files that it found: adds the pages."""
    from mkdocs.structure.files import File

    for offer in offers("methods"):
        page = method_page(offer.name)
        files.append(File.generated(config, f"methods/{offer.name}.md", content=page))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs with the text of every page."""
    return markdown.replace(PLACE, list_of_methods()) if PLACE in markdown else markdown


if __name__ == "__main__":
    sys.stdout.write(method_page(sys.argv[1]))
