# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Which editor works under which strategy, by what the classes declare and the tests try.

mkdocs asks for the table while it builds, and ``python docs/strategies.py`` prints it.
"""

from __future__ import annotations

import sys

import lightning_edit
from lightning_edit.artifacts.catalog import offers

__all__ = ["STRATEGIES", "on_page_markdown", "support", "table"]

PLACE = "{{ table of strategies }}"
#: Strategies, with what the table calls them.
STRATEGIES = {
    "ddp": "DDP",
    "FSDP2": "FSDP2",
    "TP": "tensor parallelism",
    "FSDP2+TP": "both",
}


def support() -> dict[str, tuple[str, ...]]:
    """The strategies that each editor declares."""
    methods = [offer.name for offer in offers("methods")]
    return {name: getattr(lightning_edit, name).strategies for name in methods}


def table() -> str:
    """Markdown: a row for the editors that work under the same strategies."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, strategies in support().items():
        alike.setdefault(tuple(s for s in STRATEGIES if s in strategies), []).append(name)
    head = ["editor", *STRATEGIES.values()]
    rows = [head, ["---", *[":-:"] * len(STRATEGIES)]]
    for strategies in sorted(alike, key=len, reverse=True):
        names = ", ".join(f"`{name}`" for name in alike[strategies])
        rows.append([names, *["✓" if s in strategies else "" for s in STRATEGIES]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs with the text of every page."""
    return markdown.replace(PLACE, table()) if PLACE in markdown else markdown


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
