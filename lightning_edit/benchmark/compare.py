# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""``compare``: methods × data sets × protocols × seeds as one table, resumable at any point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch.distributed
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_edit.benchmark.cells import Cell
from lightning_edit.benchmark.engine import Engine
from lightning_edit.benchmark.progress import cell_progress
from lightning_edit.benchmark.specs import (
    CellFilter,
    DataSpec,
    MethodSpec,
    Precision,
    ProtocolSpec,
    Study,
)
from lightning_edit.benchmark.statistics import figures, frame_of
from lightning_edit.benchmark.store import CellRecord, ResultsFolder, need_pandas
from lightning_edit.benchmark.tables import Section, sections, write_tables
from lightning_edit.data.base import EditDataModule
from lightning_edit.modules.base import DType
from lightning_edit.modules.protocols import ProtocolName
from lightning_edit.report.text import duration

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CellState", "StudyOutcome", "compare", "run_study", "states", "study_of"]


@dataclass(frozen=True)
class CellState:
    """A cell and how far it is.

    Args:
        cell: The cell.
        status: ``done``, ``failed`` or ``missing``.
        record: What it came to, where it has been run.
    """

    cell: Cell
    status: str
    record: CellRecord


@dataclass(frozen=True)
class StudyOutcome:
    """What a comparison came to.

    Args:
        frame: A row a figure; see ``compare``.
        sections: The same as tables.
        files: Files that were written.
        states: All cells.
    """

    frame: pd.DataFrame
    sections: Sequence[Section]
    files: Sequence[Path]
    states: Sequence[CellState]


def compare(
    methods: Sequence[str | MethodSpec],
    data: Sequence[DataSpec | EditDataModule],
    protocols: Sequence[ProtocolName | ProtocolSpec] = ("independent",),
    seeds: Sequence[int] = (0,),
    model: str = "smollm2",
    dtype: DType = "float32",
    reference: str | None = None,
    out: str = "runs/compare",
    name: str = "compare",
    cells: str | None = None,
    max_new_tokens: int = 24,
    chat_template: bool = False,
    system_prompt: str | None = None,
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: str = "auto",
    precision: Precision = "32-true",
    cache_dir: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Compares editors: methods × data sets × protocols × seeds, each combination a cell.

    A cell is known by the hash of all that makes it. One that is done is never run again, whenever
    the program was stopped; one that fails is recorded with its error and tried again in the next
    call. The unedited model is measured once a data set, and is a row of every table.

    The folder of results holds ``cells.jsonl``, ``edits.parquet`` (a row an edit and probe), and
    the tables as ``name.html``, ``name.md``, ``name.tex`` and ``name.csv``. Several comparisons may
    share it, and with it their cells.

    Args:
        methods: Names of editors, or [`MethodSpec`][lightning_edit.MethodSpec] for more than the
            settings that suit the model.
        data: Data sets.
        protocols: Ways of editing and measuring: ``independent``, ``sequential``, or
            [`ProtocolSpec`][lightning_edit.ProtocolSpec] for batches and curves.
        seeds: A run for each: of all that is drawn, and of the order of the requests.
        model: Hub id, local folder or GGUF file of a language model, or ``smollm2``.
        dtype: Precision of its weights.
        reference: Label of the method that the others are compared with; the first one when None.
        out: The folder of results.
        name: Name of the tables' files.
        cells: Run only these: ``method=ROME,protocol=batch*``. The tables show all that is done.
        max_new_tokens: Longest continuation that is read, in tokens.
        chat_template: Ask as a user of a chat model would.
        system_prompt: The system's message before each prompt, in the chat template.
        accelerator: Of Lightning's Trainer, in which each cell runs.
        devices: Of Lightning's Trainer. Several share the requests of ``independent`` alone.
        strategy: Of Lightning's Trainer.
        precision: Of Lightning's Trainer.
        cache_dir: Folder for converted models and statistics; ``~/.cache/lightning_edit`` if None.
        progress: Show a bar over all cells.

    Returns:
        A row a figure: ``data``, ``protocol``, ``method``, ``edits``, ``is_final``, ``metric``,
        ``kind``, ``reading``, ``before``, ``value``, ``low``, ``high``, ``gap``, ``n``,
        ``requests``, ``reference``, ``difference``, ``difference_low``, ``difference_high``, ``p``.

    Raises:
        EditError: If the study says what cannot be, before a model is loaded.
        MissingDependencyError: If pandas or pyarrow is not installed.

    Examples:
        >>> from lightning_edit import EditDataModule
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> folder = getfixture("tmp_path")
        >>> model, tokenizer = trained_tiny_model()
        >>> _ = model.save_pretrained(folder / "model"), tokenizer.save_pretrained(folder / "model")
        >>> frame = compare(
        ...     methods=["SCR"],
        ...     data=[EditDataModule(requests=tiny_requests(2))],
        ...     model=str(folder / "model"),
        ...     out=str(folder / "results"),
        ...     progress=False,
        ... )
        >>> frame[frame["metric"] == "reliability"][["method", "reading", "n"]].values.tolist()[-1]
        ['SCR', 'autoregressive', 2]
    """
    study = study_of(
        methods,
        data,
        protocols,
        seeds,
        model,
        dtype,
        reference,
        max_new_tokens,
        chat_template,
        system_prompt,
        accelerator,
        devices,
        strategy,
        precision,
        cache_dir,
    )
    return run_study(study, out, name, cells, progress=progress).frame


def study_of(
    methods: Sequence[str | MethodSpec],
    data: Sequence[DataSpec | EditDataModule],
    protocols: Sequence[ProtocolName | ProtocolSpec] = ("independent",),
    seeds: Sequence[int] = (0,),
    model: str = "smollm2",
    dtype: DType = "float32",
    reference: str | None = None,
    max_new_tokens: int = 24,
    chat_template: bool = False,
    system_prompt: str | None = None,
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: str = "auto",
    precision: Precision = "32-true",
    cache_dir: str | None = None,
) -> Study:
    """A study, whose parts may be named for short.

    Args:
        methods: Names of editors; or with ``preset``, ``settings`` and ``label``.
        data: Data sets; or with ``known``, ``limit`` and ``label``.
        protocols: ``independent`` or ``sequential``; or with ``size`` and ``points``.
        seeds: A run for each: of all that is drawn, and of the order of the requests.
        model: Hub id, local folder or GGUF file of a language model, or ``smollm2``.
        dtype: Precision of its weights.
        reference: Label of the method that the others are compared with; the first one when None.
        max_new_tokens: Longest continuation that is read, in tokens.
        chat_template: Ask as a user of a chat model would.
        system_prompt: The system's message before each prompt, in the chat template.
        accelerator: Of Lightning's Trainer, in which each cell runs.
        devices: Of Lightning's Trainer. Several share the requests of ``independent`` alone.
        strategy: Of Lightning's Trainer.
        precision: Of Lightning's Trainer.
        cache_dir: Folder for converted models and statistics; ``~/.cache/lightning_edit`` if None.

    Raises:
        EditError: If it says what cannot be.
    """
    return Study(
        [MethodSpec(m) if isinstance(m, str) else m for m in methods],
        [d if isinstance(d, DataSpec) else DataSpec(d) for d in data],
        [ProtocolSpec(p) if isinstance(p, str) else p for p in protocols],
        seeds,
        model,
        dtype,
        reference,
        max_new_tokens,
        chat_template,
        system_prompt,
        accelerator,
        devices,
        strategy,
        precision,
        cache_dir,
    )


def run_study(
    study: Study, out: str | Path, name: str, cells: str | None = None, *, progress: bool = True
) -> StudyOutcome:
    """Runs what is missing of a study and writes its tables.

    Args:
        study: The study.
        out: The folder of results.
        name: Name of the tables' files.
        cells: Which cells to run; all of them when None.
        progress: Show a bar over all cells.
    """
    need_pandas()
    chosen = CellFilter.parse(cells)
    folder = ResultsFolder(out)
    engine = Engine(study, folder)
    known = states(engine)
    asked = [state for state in known if chosen.takes(state.cell.labels)]
    todo = [state.cell for state in asked if state.status != "done"]
    done_before = len(asked) - len(todo)
    with cell_progress(len(asked), done_before, shown=progress and engine.is_first) as bar:
        for cell in todo:
            label = " · ".join(map(str, cell.labels.values()))
            bar.begin(label)
            record, rows = engine.run(cell)
            if engine.is_first:
                folder.add(record, rows)
            bar.end(label, _outcome(record))
            if engine.is_told_to_stop:
                raise SIGTERMException
            if record["status"] == "failed":
                rank_zero_warn(f"The cell {label} failed. {record['error']}")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # others may read what the first has just written
    found = states(engine)
    done = [state.cell for state in found if state.status == "done"]
    by_key = {state.cell.key: state.record for state in found}
    labels = {c.key: (c.data, c.protocol.label, c.method) for c in done}
    rows_frame = folder.frame(labels)
    numbers = figures(rows_frame, labels, by_key, study.reference_name)
    files: list[Path] = []
    if engine.is_first:
        files = write_tables(folder.path, name, numbers, _facts(engine, found), _notes(found))
        finished = [key for key, record in folder.records().items() if record["status"] == "done"]
        edits = folder.combine(finished)
        files += [edits] if edits else []
    return StudyOutcome(frame_of(numbers), sections(numbers), files, found)


def states(engine: Engine) -> list[CellState]:
    """All cells of an engine's study, and how far they are.

    Args:
        engine: The engine.
    """
    records = engine.folder.records()
    found = []
    for cell in engine.cells:
        record = records.get(cell.key, CellRecord())
        found.append(CellState(cell, record.get("status", "missing"), record))
    return found


def _outcome(record: CellRecord) -> str:
    if record["status"] == "failed":
        return f"failed: {record['error'].splitlines()[0]}"
    return f"done in {duration(record['seconds'])}"


def _facts(engine: Engine, found: Sequence[CellState]) -> dict[str, str]:
    """What is to be known of a study beside its figures."""
    study = engine.study
    done = [state for state in found if state.status == "done"]
    facts = {
        "model": f"{study.model} ({study.dtype}), weights {engine.sha256[:12]}…",
        "device": engine.device,
        "seeds": ", ".join(map(str, study.seeds)),
        "cells": f"{len(done)} of {len(found)} done",
        "seconds of all cells": duration(sum(s.record.get("seconds", 0.0) for s in done)),
    }
    for data in study.data:
        own = [state.record for state in done if state.cell.data == data.name]
        if own:
            filtered = ", those that the unedited model knows" if data.known else ""
            facts[f"requests of {data.name}"] = f"{own[0].get('requests')}{filtered}"
    for state in done[:1]:
        versions = cast("Mapping[str, str]", state.cell.made_of["versions"])
        facts["versions"] = ", ".join(f"{package} {one}" for package, one in versions.items())
    return facts


def _notes(found: Sequence[CellState]) -> list[str]:
    notes = []
    for state in found:
        label = " · ".join(map(str, state.cell.labels.values()))
        if state.status == "failed":
            notes.append(f"Failed: {label}. {state.record['error']}")
        elif state.status == "missing":
            notes.append(f"Not run yet: {label}.")
    return notes
