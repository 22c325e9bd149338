# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""``compare``: stopped it goes on, repeated it finds the same, and whatever fails is told."""

from __future__ import annotations

import gc
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_edit import (
    DataSpec,
    Edit,
    EditDataModule,
    EditModule,
    EditRequest,
    FineTune,
    MethodSpec,
    Probe,
    ProtocolSpec,
    compare,
)
from lightning_edit.benchmark import engine as engines
from lightning_edit.benchmark.cells import Cell
from lightning_edit.benchmark.compare import run_study, study_of
from lightning_edit.benchmark.engine import Engine
from lightning_edit.benchmark.rows import CellRow
from lightning_edit.benchmark.store import CellPart, CellRecord, ResultsFolder
from lightning_edit.benchmark.unedited import UneditedRun
from lightning_edit.core.errors import EditError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.modules import protocols
from lightning_edit.modules.fitting import edit_or_go_on

if TYPE_CHECKING:
    import pandas as pd

SCR = MethodSpec("SCR", preset=None)  # no time for reading presets
FT = MethodSpec("FineTune", None, {"layers": [1], "steps": 3, "lr": 0.01}, label="FT")
COSTS = ("seconds", "peak_memory_bytes")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    trained, tokenizer = trained_tiny_model()
    trained.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model: str) -> Callable[..., pd.DataFrame]:
    def run(out: Path, **more: object) -> pd.DataFrame:
        requests = tiny_requests(2)
        settings: dict[str, object] = {
            "methods": [SCR, FT],
            "data": [DataSpec(EditDataModule(requests=requests), label="world")],
            "protocols": [ProtocolSpec("sequential", points=[1])],
            "accelerator": "cpu",
            "max_new_tokens": 4,
            "progress": False,
        }
        return compare(model=model, out=str(out), **{**settings, **more})  # type: ignore[arg-type]

    return run


class StoppedError(Exception):
    """As the end of a program would come."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of the cells that are run, in order."""
    ran: list[str] = []
    usual = Engine.run

    def counting(self: Engine, cell: Cell) -> tuple[CellRecord, list[CellRow]]:
        ran.append(cell.method)
        return usual(self, cell)

    monkeypatch.setattr(Engine, "run", counting)
    return ran


def rates(frame: pd.DataFrame) -> list[list[object]]:
    """All figures but those that a clock or the system tells."""
    return frame[~frame["metric"].isin(COSTS)].astype(str).values.tolist()  # type: ignore[no-any-return]


def test_stopped_after_a_cell_it_goes_on_and_repeated_it_finds_the_same(
    run: Callable[..., pd.DataFrame],
    tmp_path: Path,
    counted: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run(tmp_path / "whole")
    assert counted == ["SCR", "FT"]
    # Nothing is left to do, and the unedited model is not asked again.
    monkeypatch.setattr(engines, "UneditedRun", None)
    assert rates(run(tmp_path / "whole")) == rates(whole)
    assert counted == ["SCR", "FT"]
    monkeypatch.undo()

    add = ResultsFolder.add

    def add_and_stop(self: ResultsFolder, record: CellRecord, rows: list[CellRow]) -> None:
        add(self, record, rows)
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(ResultsFolder, "add", add_and_stop)
        with pytest.raises(StoppedError):
            run(tmp_path / "parts")
    assert len(ResultsFolder(tmp_path / "parts").records()) == 1
    assert rates(run(tmp_path / "parts")) == rates(whole)
    columns = ["metric", "method", "edits", "is_final"]
    found = whole[whole["kind"] == ""][columns].drop_duplicates().values.tolist()
    assert ["reliability", "FT", 1, False] in found
    assert ["reliability", "unedited", 0, True] in found
    assert ["perplexity_ratio", "SCR", 2, True] in found
    page = (tmp_path / "parts" / "compare.html").read_text(encoding="utf-8")
    assert "<svg" in page
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    assert names >= {f"compare.{kind}" for kind in ("html", "md", "tex", "csv")}


def test_a_cell_that_fails_is_told_and_the_rest_goes_on(
    run: Callable[..., pd.DataFrame], tmp_path: Path, counted: list[str]
) -> None:
    nameless = [replace(request, subject="") for request in tiny_requests(2)]
    asked: dict[str, object] = {
        "methods": ["ROME", "SCR"],
        "data": [DataSpec(EditDataModule(requests=nameless), label="a|b <i>")],
        "protocols": ["independent"],
    }
    with pytest.warns(UserWarning, match=r"The cell ROME · a\|b <i> .* failed. RequestError"):
        frame = run(tmp_path, **asked)
    assert set(frame["method"]) == {"unedited", "SCR"}
    [error] = [r["error"] for r in ResultsFolder(tmp_path).records().values() if "error" in r]
    assert "subject" in error
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "Failed: ROME" in page
    assert "a|b &lt;i&gt;" in page
    assert "<i>" not in page
    text = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert "## a\\|b &lt;i&gt;, independent" in text
    with pytest.warns(UserWarning, match="The cell ROME"):
        run(tmp_path, **asked)
    assert counted == ["ROME", "SCR", "ROME"]


def test_a_model_that_a_method_leaves_changed_is_loaded_anew(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_edit.optim import EditOptimizer

    study = study_of(
        [FT],
        [EditDataModule(requests=tiny_requests(2))],
        ["sequential"],
        model=model,
        accelerator="cpu",
        max_new_tokens=3,
    )
    engine = Engine(study, ResultsFolder(tmp_path))
    [cell] = engine.cells
    with monkeypatch.context() as patch:
        patch.setattr(EditOptimizer, "rewind", lambda self, delta=None: None)
        record, rows = engine.run(cell)
    assert (record["status"], rows) == ("failed", [])
    assert "left the model changed" in record["error"]
    assert weight_hash(engine.model) == engine.sha256
    record, rows = engine.run(cell)
    assert record["status"] == "done"
    assert {row["edits"] for row in rows} == {2}
    assert weight_hash(engine.model) == engine.sha256


@pytest.mark.parametrize("at", [1, 2])
def test_a_process_that_is_told_to_end_does_so_between_requests(
    run: Callable[..., pd.DataFrame], tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    usual = edit_or_go_on

    def signalling(editor: EditModule, requests: list[EditRequest]) -> Edit:
        made.extend(request.id for request in requests)
        if len(made) == at:
            signal.raise_signal(signal.SIGTERM)
        return usual(editor, requests)

    monkeypatch.setattr(protocols, "edit_or_go_on", signalling)
    with pytest.raises(SIGTERMException):
        run(tmp_path, protocols=["independent"])
    assert len(made) == at
    # What was its last request, too, is not lost.
    assert len(ResultsFolder(tmp_path).records()) == at - 1


def test_a_process_that_is_told_to_end_asks_the_unedited_model_nothing_more(
    run: Callable[..., pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    usual = UneditedRun.test_step

    def signalling(self: UneditedRun, batch: list[EditRequest], batch_idx: int) -> None:
        asked.append(len(batch))
        signal.raise_signal(signal.SIGTERM)
        usual(self, batch, batch_idx)

    monkeypatch.setattr(UneditedRun, "test_step", signalling)
    monkeypatch.setattr(engines, "KNOWN_AT_ONCE", 1)
    data = DataSpec(EditDataModule(requests=tiny_requests(2)), known=True, limit=2)
    with pytest.raises(SIGTERMException):
        run(tmp_path, data=[data])
    assert asked == [1]


def test_a_cell_goes_on_within_itself_where_its_requests_are_apart(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "AT_ONCE", 2)
    study = study_of(
        [FT], [EditDataModule(requests=tiny_requests(3))], model=model, accelerator="cpu"
    )
    whole = Engine(study, ResultsFolder(tmp_path / "whole"))
    [cell] = whole.cells
    record, rows = whole.run(cell)
    assert record["failed"] == 0
    assert {row["position"] for row in rows} == {0, 1, 2}
    assert {row["edits"] for row in rows} == {1}
    names = {path.name for path in (tmp_path / "whole" / "cells").iterdir()}
    assert names == {f"{cell.key}.{start}.json" for start in (0, 2)}

    folder = ResultsFolder(tmp_path / "parts")
    engine = Engine(study, folder)
    make, starts = Engine._part, list[int]()

    def stopping(self: Engine, *args: object) -> CellPart:
        starts.append(len(starts))
        if len(starts) == 2:
            raise StoppedError
        return make(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "_part", stopping)
    assert engine.run(cell)[0]["status"] == "failed"
    record, again = Engine(study, folder).run(cell)
    assert len(starts) == 3  # the first part was not made again
    told = ("seconds",)
    assert [{k: v for k, v in row.items() if k not in told} for row in again] == [
        {k: v for k, v in row.items() if k not in told} for row in rows
    ]
    folder.add(record, again)
    assert [path.name for path in (folder.path / "cells").iterdir()] == [f"{cell.key}.parquet"]


def test_memory_of_a_part_is_without_what_the_part_before_has_left(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "AT_ONCE", 1)
    study = study_of(
        [FT], [EditDataModule(requests=tiny_requests(3))], model=model, accelerator="cpu"
    )
    living: list[int] = []

    def begin(_: object) -> None:
        living.append(sum(type(one) is FineTune for one in gc.get_objects()))

    monkeypatch.setattr(engines._PeakMemory, "begin", begin)
    gc.collect()
    gc.disable()
    try:
        engine = Engine(study, ResultsFolder(tmp_path))
        record, _ = engine.run(*engine.cells)
    finally:
        gc.enable()
    assert record["status"] == "done", record.get("error")
    assert living == [1, 1, 1]


def test_facts_that_the_model_knows_are_kept_up_to_the_limit(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tiny_requests(4)
    never = replace(known[0], target_old="Nobody", id="never")
    study = study_of(
        ["SCR"],
        [
            DataSpec(EditDataModule(requests=[never, *known[1:]]), known=True, limit=2),
            DataSpec(EditDataModule(requests=[never]), known=True, label="never"),
        ],
        model=model,
        accelerator="cpu",
    )
    engine = Engine(study, ResultsFolder(tmp_path))
    found = engine.unedited(study.data[0])
    assert [r.id for r in found.requests] == [r.id for r in known[1:3]]
    assert {p.autoregressive for p in found.evaluation.probes if p.metric == "locality"} == {True}
    read = Engine(study, ResultsFolder(tmp_path)).unedited(study.data[0])
    assert read.evaluation.probes == found.evaluation.probes
    assert read.evaluation.baseline.ids == found.evaluation.baseline.ids
    record, _ = engine.run(engine.cells[1])
    assert record["status"] == "failed"
    assert "none of the 1 facts of 'never'" in record["error"]
    # Asked once, also where the answer is that nothing is known.
    again = Engine(study, ResultsFolder(tmp_path))
    monkeypatch.setattr(again, "_asked", None)
    record, _ = again.run(again.cells[1])
    assert "none of the 1 facts of 'never'" in record["error"]


def test_scores_are_those_of_an_editor_that_measures_by_itself(model: str, tmp_path: Path) -> None:
    """What is known of the unedited model stands for measuring it."""
    from lightning.pytorch import Trainer

    from lightning_edit import FineTune

    requests: list[EditRequest] = tiny_requests(2)
    study = study_of(
        [FT], [EditDataModule(requests=requests)], ["independent"], model=model, accelerator="cpu"
    )
    engine = Engine(study, ResultsFolder(tmp_path))
    record, rows = engine.run(engine.cells[0])
    editor = FineTune(model=model, **FT.settings)  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
    )
    trainer.test(editor, datamodule=EditDataModule(requests=requests), verbose=False)
    assert record["status"] == "done"
    for scores, suffix in ((editor.measured.before, "_before"), (editor.measured.after, "")):
        by_prompt = {(p.request_id, p.metric, p.prompt): p for p in scores}
        for row in rows:
            probe = by_prompt[row["request_id"], row["metric"], row["prompt"]]
            assert row[f"autoregressive{suffix}"] == probe.autoregressive  # type: ignore[literal-required]
            assert row[f"text{suffix}"] == probe.text  # type: ignore[literal-required]
            forced = row[f"teacher_forced{suffix}"]  # type: ignore[literal-required]
            assert forced == pytest.approx(probe.teacher_forced)


def test_a_study_is_refused_before_its_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(EditError, match="no method 'Rome'"):
        compare(
            ["Rome"],
            [EditDataModule(requests=tiny_requests(1))],
            model="./nowhere",
            out=str(tmp_path),
        )
    assert not list(tmp_path.iterdir())


def test_cases_are_measured_by_themselves(model: str, tmp_path: Path) -> None:
    """One after another each edit of a pair shows alone, too; a batch takes a case as one edit."""
    fact = replace(tiny_requests(1)[0], locality=(), portability=(), case="pair")
    answers = [fact.target_old or "", fact.target_new]
    follows = Probe(fact.prompt, fact.target_new, "conflict")
    objects = tuple(Probe(fact.prompt, answer, "neighborhood") for answer in answers[:1])
    other = tiny_requests(2)[1]
    pair = [
        replace(fact, target_new=other.target_new, id="first"),
        replace(fact, id="second", portability=(follows,), locality=objects),
    ]
    hop = Probe(other.prompt, other.target_new, "multi_hop")
    hops = (hop, Probe(other.rephrases[0], other.target_new, "multi_hop"))
    chain = [replace(tiny_requests(3)[2], portability=(), case="chain")]
    chain += [replace(other, portability=hops, case="chain")]
    study = study_of(
        [FT],
        [DataSpec(EditDataModule(requests=[*pair, *chain]), label="world", limit=2)],
        ["independent"],
        model=model,
        accelerator="cpu",
    )
    outcome = run_study(study, tmp_path, "cases", progress=False)
    frame = outcome.frame
    own = frame[frame["method"] == "FT"].set_index(["metric", "kind", "reading", "is_final"])
    assert own.loc[("reliability", "", "autoregressive", True), ["edits", "n"]].tolist() == [2, 4]
    assert own.loc[("reliability", "", "autoregressive", False), ["edits", "n"]].tolist() == [1, 2]
    assert own.loc[("portability", "multi_hop", "autoregressive", True), "n"] == 1
    # The later edit stands, and it took from the earlier.
    assert own.loc[("conflict_score", "", "", True), "value"] == 1.0
    assert own.loc[("conflict_magnitude", "", "", True), "value"] > 0.5
    assert 0.0 < own.loc[("distortion", "", "", True), "value"] <= math.log(2)
    assert own.loc[("ignore_rate", "", "", True), "value"] == 1.0
    assert "Pairs of edits that contradict" in (tmp_path / "cases.md").read_text(encoding="utf-8")

    data = [EditDataModule(requests=chain)]
    batch = study_of([FT], data, [ProtocolSpec("batch", size=1)], model=model, accelerator="cpu")
    [cell] = (engine := Engine(batch, ResultsFolder(tmp_path))).cells
    record, rows = engine.run(cell)
    assert record["status"] == "done"
    assert {(row["edits"], row["is_final"]) for row in rows} == {(2, True)}
    at_once = study_of([FT], [EditDataModule(requests=pair)], [ProtocolSpec("batch", size=1)])
    at_once.model, at_once.accelerator = model, "cpu"
    [cell] = (engine := Engine(at_once, ResultsFolder(tmp_path))).cells
    assert "contradict each other" in engine.run(cell)[0]["error"]
