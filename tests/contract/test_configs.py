# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Every configuration that is shipped parses, composes and runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningDataModule

from lightning_edit import Edit, EditModule, TrainedEditor, WeightDelta
from lightning_edit.cli.parsing import EditParser
from lightning_edit.cli.trainer import EditCLI
from tests.contract.enumeration import (
    CONFIGS,
    EDITORS,
    LEARNERS,
    METHOD_CONFIGS,
    class_in,
    quick,
)
from tests.runs import TinyWorld, metrics_of, run_here

# Those of comparisons are studies, with a test of their own.
ALL = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "benchmark")
DATA_CONFIGS = sorted((CONFIGS / "data").glob("*.yaml"))
TRAINER_CONFIGS = sorted((CONFIGS / "trainer").glob("*.yaml"))

pytestmark = pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning")


class Parsing(EditCLI):
    """The command line without building anything."""

    def instantiate_classes(self) -> None:
        pass


@pytest.fixture(scope="module")
def parser() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lightning-edit", "--config", str(CONFIGS / "edit.yaml")])
        cli = Parsing(
            EditModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=EditParser,
            run=False,
        )
    return cli.parser


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"), n=3)


def test_there_is_something_to_test() -> None:
    assert {path.parent.name for path in ALL} >= {"configs", "method", "data", "trainer"}
    assert {class_in(path) for path in METHOD_CONFIGS} == {*EDITORS, *LEARNERS}


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_the_command_line_parses_it_and_prints_what_parses_again(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    # Verbs need a method and data; sections of their own come without.
    others = [
        part
        for key, part in (("model", "method/rome.yaml"), ("data", "data/facts.yaml"))
        if key not in sections
        for part in ("-c", part)
    ]
    assert run_here(["fit", *others, "-c", str(path), "--print_config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert run_here(["fit", "-c", str(printed), "--print_config"]) == 0
    assert capsys.readouterr().out == printed.read_text()


def test_every_method_composes_with_all_data_and_trainers(parser: Any) -> None:
    folders = {"model": METHOD_CONFIGS, "data": DATA_CONFIGS, "trainer": TRAINER_CONFIGS}
    for section, paths in folders.items():
        for path in paths:  # which say nothing of what the others are about
            assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == {section}, path
    others = zip(itertools.cycle(DATA_CONFIGS), itertools.cycle(TRAINER_CONFIGS), strict=True)
    assert len(METHOD_CONFIGS) >= max(len(DATA_CONFIGS), len(TRAINER_CONFIGS))
    for method, (data, trainer) in zip(METHOD_CONFIGS, others, strict=False):
        words = [part for path in (trainer, method, data) for part in ("--config", str(path))]
        parsed = parser.parse_args(words)
        assert parsed.model.class_path == f"lightning_edit.{class_in(method)}", words
        assert parsed.data.class_path == f"lightning_edit.{class_in(data, 'data')}", words


@pytest.mark.parametrize(
    "path",
    [path for path in METHOD_CONFIGS if class_in(path) in EDITORS] + [CONFIGS / "edit.yaml"],
    ids=lambda path: str(path.stem),
)
def test_a_method_runs_from_its_configuration(world: TinyWorld, tmp_path: Path, path: Path) -> None:
    cls = EDITORS[class_in(path)]
    # The tiny model has four layers; a trained editor knows its own, and some change none.
    own = cls is TrainedEditor or "layers" in cls.unused_arguments
    settings = quick(cls) if own else {**quick(cls), "layers": [1]}
    words = [
        f"--model.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in settings.items()
    ]
    words += [f"--model.model={world.model}", f"--model.cache_dir={tmp_path / 'cache'}"]
    data = ["--data=EditDataModule", f"--data.path={world.requests}"]
    run = tmp_path / "run"
    trainer = ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={run}"]
    files = [CONFIGS / "trainer" / "default.yaml", path]
    configs = [part for file in files for part in ("-c", str(file))]
    assert run_here(["fit", *configs, *data, *words, *trainer]) == 0
    assert metrics_of(run)["reliability/teacher_forced"]["n"] == 3
    delta = Edit.load(run / "delta")
    assert delta.norm() > 0
    assert delta.provenance.method == class_in(path)
    assert (run / "config.yaml").is_file()


@pytest.mark.parametrize(
    "path",
    [path for path in METHOD_CONFIGS if class_in(path) in LEARNERS],
    ids=lambda path: str(path.stem),
)
def test_an_editor_is_trained_from_its_configuration_and_edits_from_its_checkpoint(
    world: TinyWorld, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {**quick(LEARNERS[class_in(path)]), "layers": [1]}
    words = [f"--model.{name}={json.dumps(value)}" for name, value in settings.items()]
    model = [f"--model.model={world.model}"]
    data = ["--data=HeldOut"]
    for part in ("train", "held_out"):
        data += [f"--data.{part}=EditDataModule", f"--data.{part}.path={world.requests}"]
    files = [path, CONFIGS / "trainer" / "hypernetwork.yaml"]
    configs = [part for file in files for part in ("-c", str(file))]
    cpu = ["--trainer.accelerator=cpu"]
    assert run_here(["fit", *configs, *data, *words, *model, *cpu]) == 0
    curves = (tmp_path / "runs/editor/curves/metrics.csv").read_text()
    assert {"loss", "val/loss", "val/reliability/teacher_forced"} <= set(
        curves.splitlines()[0].split(",")
    )
    files = [CONFIGS / "trainer" / "default.yaml", CONFIGS / "method" / "trained_editor.yaml"]
    configs = [part for file in files for part in ("-c", str(file))]
    data = ["--data=EditDataModule", f"--data.path={world.requests}"]
    assert run_here(["fit", *configs, *data, *model, *cpu]) == 0
    delta = Edit.load(tmp_path / "runs/edit/delta")
    assert delta.norm() > 0
    assert len(delta.provenance.request_ids) == 3


def test_a_saved_configuration_repeats_the_run(world: TinyWorld, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_here(world.arguments(first)) == 0
    words = ["fit", "-c", str(first / "config.yaml"), f"--trainer.default_root_dir={second}"]
    assert run_here(words) == 0
    assert WeightDelta.load(first / "delta").hashes == WeightDelta.load(second / "delta").hashes
    assert metrics_of(first) == metrics_of(second)
