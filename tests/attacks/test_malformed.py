# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Malformed inputs of every kind: each is read rightly, or refused by an error of ours.

200 of them in the fast suite, 2,000 in the slow one.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import lightning_edit
from lightning_edit import Edit, EditDataModule, EditRequest, Ledger, WeightDelta
from lightning_edit.artifacts import report
from lightning_edit.checkpoints import read_checkpoint
from lightning_edit.core.change import LowRank
from lightning_edit.core.errors import EditError
from lightning_edit.core.files import content_hash
from lightning_edit.core.tensor_files import read_sealed
from lightning_edit.data import OldNewPairs
from lightning_edit.demos import tiny_requests
from lightning_edit.ledger.entries import COLUMNS, row_hash
from lightning_edit.presets import find_config
from lightning_edit.report import RunReport, write_results

#: Inputs of a round of all kinds in the fast suite, and in the slow one.
FAST, SLOW = 200, 2000

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "{}", "\ud83d", "\x1b[31m", "\u202eemoR", "a\x00b", "<script>", "../x"]
    ),
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    TEXTS,
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *("prompt", "subject", "target_new", "target_old", "rephrases", "locality", "id", "glued"),
        *("portability", "subject_start", "metadata", "case_id", "requested_rewrite", "src", "alt"),
        *("answers", "loc", "questions", "target", "source", "output_old", "output_new", "text"),
    ]
)
RECORDS = st.dictionaries(FIELDS, VALUES, max_size=6)
BYTES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"[" * 5000, b"{" * 5000, b"a: &a [*a]", b"x: !!python/object:os.system {}"]),
    st.sampled_from(
        [b"1" * 5000, b"- 2001-99-99", b"? {a: b}\n: c", b"\xff\xfe", b"NaN", b"<<: 1"]
    ),
)
LOADERS = [
    cls
    for name in lightning_edit.__all__
    if isinstance(cls := getattr(lightning_edit, name), type) and issubclass(cls, EditDataModule)
]


def _request(data: st.DataObject, folder: Path) -> None:
    record = {**tiny_requests(1)[0].to_dict(), **data.draw(RECORDS)}
    EditRequest.from_dict(record)


def _data_file(data: st.DataObject, folder: Path) -> None:
    cls = data.draw(st.sampled_from([*LOADERS, OldNewPairs]))
    suffix = data.draw(st.sampled_from([".json", ".jsonl", ".yaml"]))
    file = folder / f"data{suffix}"
    records = data.draw(st.lists(RECORDS, max_size=3))
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(BYTES))
    elif suffix == ".jsonl":
        file.write_text("\n".join(map(json.dumps, records)))
    else:
        file.write_text(json.dumps(records))
    cls(path=str(file)).setup("fit")


def _edit_folder(data: st.DataObject, folder: Path) -> None:
    change = LowRank(torch.ones(4, 1), torch.ones(3, 1))
    delta = WeightDelta({"w": change}, originals={"w": torch.ones(4, 3)}).save(folder / "delta")
    path = delta / "delta_config.json"
    config = json.loads(path.read_text())
    name = data.draw(st.sampled_from([*config, "memory", "entries", "replaced", "order"]))
    config[name] = data.draw(VALUES)
    if data.draw(st.booleans()):
        config["format_version"] = data.draw(st.sampled_from([1, 2]))
    try:
        config["sha256"] = content_hash(config)
        path.write_text(json.dumps(config))
    except ValueError:
        path.write_bytes(data.draw(BYTES))
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(4, 3))
    before = model.w.detach().clone()
    try:
        edit = Edit.load(delta)
        edit.apply_(model)
        edit.revert_(model)
    finally:
        assert torch.equal(model.w, before)


def _tensors(data: st.DataObject, folder: Path) -> None:
    change = LowRank(torch.ones(4, 1), torch.ones(3, 1))
    delta = WeightDelta({"w": change}).save(folder / "delta")
    whole = (delta / "delta.safetensors").read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    (delta / "delta.safetensors").write_bytes(whole[:at] + data.draw(BYTES))
    config = json.loads((delta / "delta_config.json").read_text())
    config |= {"format_version": 1, "tensors_sha256": ""}
    del config["sha256"]
    (delta / "delta_config.json").write_text(json.dumps(config))
    with suppress(ValueError):  # which who asks for second moments turns into one of ours
        read_sealed(delta / "delta.safetensors")
    Edit.load(delta)


def _checkpoint(data: st.DataObject, folder: Path) -> None:
    file = folder / "a.ckpt"
    torch.save({"lightning_edit": {}, "state_dict": {"w": torch.ones(3)}}, file)
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    file.write_bytes(whole[:at] + data.draw(BYTES) + whole[at + data.draw(st.integers(0, 9)) :])
    read_checkpoint(file)


def _config(data: st.DataObject, folder: Path) -> None:
    file = folder / "run.yaml"
    file.write_bytes(data.draw(BYTES))
    find_config(str(file))


def _results(data: st.DataObject, folder: Path) -> None:
    write_results(RunReport(method="ROME"), folder, ("results.json",))
    found = json.loads((folder / "results.json").read_text())
    found[data.draw(st.sampled_from([*found, "edits"]))] = data.draw(VALUES)
    (folder / "results.json").write_text(json.dumps(found))
    report(str(folder))


def _ledger(data: st.DataObject, folder: Path) -> None:
    """A ledger of two edits, in whose database a value or some bytes are others."""
    file = folder / "ledger.db"
    for left in folder.glob("ledger.db*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(4, 3))
    whole = Ledger(file)
    for number in range(2):
        edit = WeightDelta({"w": LowRank(torch.ones(4, 1), torch.ones(3, 1))})
        edit.apply_(model)
        whole.record(edit, model, requests=tiny_requests(2)[number:][:1])
    if data.draw(st.booleans()):
        _change_row(data, file)
    else:
        found = file.read_bytes()
        at = data.draw(st.integers(0, len(found)))
        file.write_bytes(found[:at] + data.draw(BYTES) + found[at + data.draw(st.integers(0, 9)) :])
    before = model.w.detach().clone()
    for ask in (
        lambda: whole.verify(),
        lambda: Ledger(file).entries(),
        lambda: whole.export(folder / "ledger.csv", force=True),
        lambda: whole.note("refused", tiny_requests(1), model),
        lambda: whole.standing(model),
        lambda: whole.plan(model, everything=True),
        lambda: whole.approve(model, 1),
    ):
        with suppress(EditError):
            ask()
        assert torch.equal(model.w, before)
    try:
        whole.undo(model, 1)
    except EditError:
        assert torch.equal(model.w, before)
        raise


def _change_row(data: st.DataObject, file: Path) -> None:
    """Writes something into a row past the ledger, with a hash that fits or without."""
    column = data.draw(st.sampled_from(COLUMNS[1:]))
    value = data.draw(st.one_of(LEAVES, VALUES.map(repr), BYTES, st.builds(_json, VALUES)))
    with closing(sqlite3.connect(file)) as connection:
        connection.row_factory = sqlite3.Row
        connection.execute("DROP TRIGGER edits_keep_update")
        with suppress(sqlite3.Error, OverflowError, UnicodeEncodeError):
            connection.execute(f"UPDATE edits SET {column} = ? WHERE id = 2", [value])  # noqa: S608
        if data.draw(st.booleans()):
            [row] = connection.execute("SELECT * FROM edits WHERE id = 2")
            with suppress(TypeError):
                fitting = row_hash(dict(row))
                connection.execute("UPDATE edits SET hash = ? WHERE id = 2", [fitting])
        connection.commit()


def _json(value: Any) -> str:
    return json.dumps(value)


KINDS: dict[str, Callable[[st.DataObject, Path], None]] = {
    "requests": _request,
    "data files": _data_file,
    "descriptions": _edit_folder,
    "tensors": _tensors,
    "checkpoints": _checkpoint,
    "configurations": _config,
    "ledgers": _ledger,
    "results": _results,
}


def _try(kind: str, number: int, folder: Path) -> None:
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(EditError):
                KINDS[kind](data, folder)

    attempt()


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_inputs_are_refused_by_errors_of_ours(kind: str, tmp_path: Path) -> None:
    _try(kind, FAST // len(KINDS) + 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_malformed_inputs(kind: str, tmp_path: Path) -> None:
    _try(kind, SLOW // len(KINDS) + 1, tmp_path)


def test_documents_that_explode_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    merged = ["b0: &b0 {x: 1}"]
    merged += [f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    for text in ("\n".join(lines), "\n".join(merged), "&a [*a]", "[" * 100_000):
        file = tmp_path / "a.yaml"
        file.write_text(text)
        for read in (find_config, lightning_edit.EditDataModule(path=str(file)).setup):
            with pytest.raises(EditError, match=r"aliases|part of itself|too deeply"):
                read(str(file))
    assert yaml.safe_load("a: &x 1\nb: *x") == {"a": 1, "b": 1}


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    calls: list[Callable[[], Any]] = [
        lambda: find_config(str(pipe)),
        lambda: EditDataModule(path=str(pipe)).setup("fit"),
        lambda: read_checkpoint(pipe),
        lambda: lightning_edit.TextDataModule(path=str(pipe)).texts().__next__(),
    ]
    for call in calls:
        with pytest.raises(EditError):
            call()
