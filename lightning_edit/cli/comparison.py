# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The command line of ``compare``: one or several configurations, each of which is a study."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_edit.benchmark.compare import CellState, StudyOutcome, run_study, states, study_of
from lightning_edit.benchmark.engine import Engine
from lightning_edit.benchmark.specs import CellFilter, Study
from lightning_edit.benchmark.store import ResultsFolder, need_pandas
from lightning_edit.cli.parsing import EditParser
from lightning_edit.cli.tables import Table, show_tables
from lightning_edit.cli.trainer import quiet_down
from lightning_edit.presets import find_config
from lightning_edit.report.text import duration

__all__ = ["main", "parser"]

PROGRAM = "lightning-edit compare"
DEFAULT_NAME = "compare"
# What a command says of a study beside what the study is.
_ASIDE = ("config", "out", "cells", "list")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the studies that a command line names, one after another, and prints their tables.

    Args:
        arguments: The verb and its options; the process's own when None.
    """
    quiet_down()
    _, *words = sys.argv[1:] if arguments is None else arguments
    configs, others = _parted(words)
    made = parser()
    parsed: list[tuple[str, Namespace]] = []
    for config in configs or [""]:
        given = ["--config", find_config(config)] if config else []
        options = made.instantiate_classes(made.parse_args([*given, *others]))
        parsed.append((Path(config).stem if config else DEFAULT_NAME, options))
    studies = [(name, _study(options), options) for name, options in parsed]
    need_pandas()
    for _, study, _ in studies:  # before hours are spent on the first
        study.check()
    for name, study, options in studies:
        if options.list:
            engine = Engine(study, ResultsFolder(options.out))
            show_tables([_listed(name, states(engine), CellFilter.parse(options.cells))])
        else:
            try:
                outcome = run_study(study, options.out, name, options.cells)
            except SIGTERMException:
                # Lightning's own status would be 0, as if all cells were done.
                sys.exit(128 + signal.SIGTERM)
            show_tables(_tables(outcome))
            if any(state.status == "failed" for state in outcome.states):
                sys.exit(1)


def parser() -> EditParser:
    """The parser of the verb's options, made of ``study_of``'s signature and docstring."""
    made = EditParser(prog=PROGRAM, description="Compares editors, and goes on where it stopped.")
    made.add_argument(
        "-c",
        "--config",
        action="config",
        help="A study in YAML, such as `benchmark/smoke.yaml`. Several are run after one another.",
    )
    made.add_function_arguments(study_of, as_group=False)
    made.add_argument("--out", default="runs/compare", help="The folder of results.")
    made.add_argument(
        "--cells",
        type=str | None,
        default=None,
        help="Run only these: `method=ROME,protocol=batch*`. The tables show all that is done.",
    )
    made.add_argument(
        "--list", action="store_true", help="List all cells with how far they are, and run none."
    )
    return made


def _parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Configurations, of which one option may name several, and all other words."""
    configs: list[str] = []
    others: list[str] = []
    are_configs = False
    for word in words:
        if word in ("-c", "--config"):
            are_configs = True
        elif word.startswith("--config="):
            configs.append(word.removeprefix("--config="))
        elif are_configs and not word.startswith("-"):
            configs.append(word)
        else:
            are_configs = False
            others.append(word)
    return configs, others


def _study(options: Namespace) -> Study:
    return study_of(**{k: v for k, v in options.as_dict().items() if k not in _ASIDE})


def _listed(name: str, found: Sequence[CellState], chosen: CellFilter) -> Table:
    rows = []
    for state in found:
        labels = state.cell.labels
        if chosen.takes(labels):
            seconds = state.record.get("seconds") if state.status == "done" else None
            said = state.record.get("error", "").partition("\n")[0]
            cells = (state.cell.key[:12], *map(str, labels.values()), state.status)
            rows.append((*cells, duration(seconds), said))
    columns = ("cell", "method", "data", "protocol", ">seed", "status", ">time", "error")
    counts = {s: sum(r[5] == s for r in rows) for s in ("done", "failed", "missing")}
    note = ", ".join(f"{count} {status}" for status, count in counts.items())
    return Table(columns, rows, name, [note])


def _tables(outcome: StudyOutcome) -> list[Table]:
    # The first table of each; the others are in the files.
    found = [
        Table(table.columns, table.rows, f"{section.title}: {table.title.lower()}")
        for section in outcome.sections
        for table in section.tables[:1]
    ]
    missing = sum(state.status != "done" for state in outcome.states)
    notes = [f"Wrote {path}" for path in outcome.files]
    notes += [f"{missing} of {len(outcome.states)} cells are not done."] if missing else []
    return [*found, Table(notes=notes)]
