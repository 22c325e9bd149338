# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Running text from files and hub data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_edit.core.errors import RequestError
from lightning_edit.data import TextDataModule

LINES = ["The first text.", "The second, longer text.", "A third one."]


def saved(folder: Path, **columns: Any) -> str:
    """A data set in a folder, as the hub would give it."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns).to_json(str(folder / "train.jsonl"))
    return str(folder)


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n".join([LINES[0], "", "   ", *LINES[1:], ""]))
    data = TextDataModule(path=str(file), batch_size=2)
    for _ in range(2):  # as often as it is asked
        assert list(data.train_dataloader()) == [LINES[:2], LINES[2:]]


def test_a_hub_data_set_is_read_by_column(tmp_path: Path) -> None:
    folder = saved(tmp_path, body=[*LINES, " "], title=["a", "b", "c", "d"])
    data = TextDataModule(hub=folder, column="body")
    assert [text for batch in data.train_dataloader() for text in batch] == LINES


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, body=LINES)
    data = TextDataModule(hub=folder)
    with pytest.raises(RequestError, match=r"\[0\]: `column` is 'text', .* Columns here: body"):
        list(data.train_dataloader())


def test_sources_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="from `path` or from `hub`, but got path=None"):
        TextDataModule()
    with pytest.raises(RequestError, match="Give one of them"):
        TextDataModule(path="a.txt", hub="b")
    with pytest.raises(RequestError, match=r"`batch_size` .* at least 1, got 0"):
        TextDataModule(path="a.txt", batch_size=0)
    with pytest.raises(RequestError, match="there is no text file"):
        list(TextDataModule(path=str(tmp_path / "none.txt")).train_dataloader())
