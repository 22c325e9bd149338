# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Every data section that comes with the package builds its data module."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

import lightning_edit.data
from lightning_edit.core.request import EditRequest, Probe
from lightning_edit.data import EditDataModule, HeldOut

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))


def build(path: Path) -> LightningDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    parser.add_argument("--config", action="config")
    data = parser.instantiate(parser.parse_args(["--config", str(path)])).data
    assert isinstance(data, LightningDataModule)
    return data


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_data_section_builds(path: Path) -> None:
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# ")
    assert second == "data:"
    build(path)


def test_every_data_module_has_a_section() -> None:
    modules = {
        value
        for name in lightning_edit.data.__all__
        if isinstance(value := getattr(lightning_edit.data, name), type)
        and issubclass(value, EditDataModule)
    }
    assert {type(build(path)) for path in CONFIGS} == {*modules, HeldOut}


def test_requests_may_stand_in_the_config(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(
        """
data:
  class_path: EditDataModule
  init_args:
    requests:
      - prompt: The capital of {} is
        subject: France
        target_new: Rome
        rephrases: [France's capital is]
        portability: [{prompt: Pizza is from the capital of, answer: France, kind: inverse}]
    batch_size: 2
"""
    )
    data = build(path)
    assert isinstance(data, EditDataModule)
    assert data.batch_size == 2
    assert data.requests == [
        EditRequest(
            "The capital of France is",
            "France",
            "Rome",
            rephrases=("France's capital is",),
            portability=(Probe("Pizza is from the capital of", "France", "inverse"),),
        )
    ]
