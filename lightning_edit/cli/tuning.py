# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The command line of ``tune``: settings of methods for a model, as presets."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_edit.cli.parsing import EditParser
from lightning_edit.cli.tables import Table, show_tables
from lightning_edit.cli.trainer import quiet_down
from lightning_edit.report.text import number
from lightning_edit.tuning.tune import METRICS, READINGS, tune

__all__ = ["main"]

PROGRAM = "lightning-edit tune"


def main(arguments: Sequence[str] | None = None) -> None:
    """Searches, writes the presets and prints all candidates.

    Args:
        arguments: The verb and its options; the process's own when None.
    """
    quiet_down()
    _, *words = sys.argv[1:] if arguments is None else arguments
    parser = EditParser(prog=PROGRAM, description="Chooses a method's settings for a model.")
    parser.add_argument("-c", "--config", action="config", help="The options below in YAML.")
    parser.add_function_arguments(tune, as_group=False)
    parsed = parser.instantiate_classes(parser.parse_args(words)).as_dict()
    options = {name: value for name, value in parsed.items() if name != "config"}
    frame = tune(**options)
    columns = ["method", "facts", "settings", *(f">{metric}" for metric in METRICS), ">score"]
    rows = []
    for row in frame.to_dict("records"):
        pairs = (" / ".join(number(row[f"{m}/{r}"], 2) for r in READINGS) for m in METRICS)
        rows.append((row["method"], row["data"], row["label"], *pairs, number(row["score"], 3)))
    files = [Path(options["out"]) / f"{name.lower()}.yaml" for name in options["methods"]]
    notes = [
        f"Wrote {file}; edit by it with `lightning-edit fit -c edit -c {file}`." for file in files
    ]
    show_tables([Table(columns, rows, "Teacher-forced / autoregressive", notes)])
