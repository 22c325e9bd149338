# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The table in docs/families.md, of what was measured: ``python -m tests.families.table``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch

from tests.families.architectures import ARCHITECTURES, build
from tests.families.measure import METHODS, Row, measure

__all__ = ["PAGE", "line_of", "lines"]

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
COLUMNS = (*METHODS, "evaluator", "load_model")
HEADER = [
    f"| model | last projection of the MLP | {' | '.join(COLUMNS)} |".replace("_", "\\_"),
    f"|{'---|' * (len(COLUMNS) + 2)}",
]
# What a refusal is about, by words in it.
REASONS = {
    "mixture of experts": "experts",
    "encoder alone": "encoder",
    "has an encoder": "decoders only",
    "has no MLP": "no MLP",
    "more than one stream": "streams",
}


def line_of(row: Row) -> str:
    """A row of the table."""
    places = [f"`{place}`" if place else "–" for place, _ in groupby(row.mlp_out)]
    cells = [_short(row.cells[column]) for column in COLUMNS]
    return f"| {row.kind} | {', '.join(dict.fromkeys(places)) or '–'} | {' | '.join(cells)} |"


def _short(cell: str) -> str:
    if not cell.startswith("refused"):
        return cell
    return next((short for words, short in REASONS.items() if words in cell), "refused")


def lines() -> Iterator[str]:
    """All rows of the table."""
    for name in ARCHITECTURES:
        yield line_of(measure(name, build(name)))


def main() -> None:
    """Writes the table into the page."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    text = PAGE.read_text()
    start = text.index(HEADER[0][:8])
    found = []
    for line in lines():
        print(line, flush=True)
        found.append(line)
    PAGE.write_text(text[:start] + "\n".join([*HEADER, *found]) + "\n")


if __name__ == "__main__":
    main()
