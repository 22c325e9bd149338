# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The table in docs/families.md, of what was measured.

``python -m tests.families.table`` measures all architectures, and with names behind it these alone.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import torch

from tests.families.architectures import ARCHITECTURES, build
from tests.families.measure import METHODS, Row, measure

__all__ = ["PAGE", "line_of"]

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
TITLE = "## The table\n"
COLUMNS = (*METHODS, "evaluator", "load_model")
HEADER = [
    f"| model | class | last projection of the MLP | {' | '.join(COLUMNS)} |".replace("_", "\\_"),
    f"|{'---|' * (len(COLUMNS) + 3)}",
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
    found = ", ".join(dict.fromkeys(places)) or "–"
    cells = [_short(row.cells[column]) for column in COLUMNS]
    return f"| {' | '.join([row.name, row.kind, found, *cells])} |"


def _short(cell: str) -> str:
    if not cell.startswith("refused"):
        return cell
    return next((short for words, short in REASONS.items() if words in cell), "refused")


def write(rows: Mapping[str, str]) -> None:
    """Puts rows of the table, by name, into the page, whose other rows stay."""
    before, title, table = PAGE.read_text().partition(TITLE)
    about, _, old = table.partition(HEADER[0][:10])
    known = {line.split(" ")[1]: line for line in old.splitlines() if line.startswith("| ")}
    known |= rows
    lines = [*HEADER, *(known[name] for name in ARCHITECTURES if name in known)]
    PAGE.write_text(before + title + about + "\n".join(lines) + "\n")


def main(names: Sequence[str]) -> None:
    """Measures architectures, and writes their rows as soon as they are known."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for name in names or ARCHITECTURES:
        row = line_of(measure(name, build(name)))
        print(row, flush=True)
        write({name: row})


if __name__ == "__main__":
    main(sys.argv[1:])
