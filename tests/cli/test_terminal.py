# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Runs on systems with less: terminals of few characters, another locale, no Unix modules."""

from __future__ import annotations

import csv
import io
import json
import locale
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_edit.rendering.terminal import spell_out
from tests.runs import NOISE, ROOT, TinyWorld, run_here

# A locale that Python takes at its word: files and streams are of ASCII unless told otherwise.
POOR = {
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": "ascii",
}
# Windows has no `resource`, of which transformers knows there, but not here.
PROGRAM = """\
import sys
import transformers.models.llama.modeling_llama
sys.modules["resource"] = None
import lightning_edit.cli.trainer
from lightning_edit.__main__ import main
sys.exit(main())
"""


PROMPT = "{} is — ça ‖"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """Its configuration is of ASCII, but what it says is not."""
    world = TinyWorld(tmp_path_factory.mktemp("world"), n=2)
    config = yaml.safe_load(world.config.read_text(encoding="utf-8"))
    config["model"]["init_args"]["kl_prompt"] = PROMPT
    world.config.write_text(yaml.safe_dump(config), encoding="ascii")
    return world


def written(encoding: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What a verb writes to a terminal of an encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    assert run_here(words) == 0
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode(encoding)


def fit(world: TinyWorld, root: Path) -> list[str]:
    return [
        *("fit", "-c", "edit", "-c", str(world.config), f"--trainer.default_root_dir={root}"),
        "--trainer.logger=CSVLogger",
        f"--trainer.logger.init_args.save_dir={root / 'log'}",
        "--trainer.log_every_n_steps=1",
    ]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_fit_survives_a_terminal_of_few_characters(
    encoding: str, world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = written(encoding, monkeypatch, *fit(world, tmp_path))
    assert "p_target" in text
    assert "relative_norm" in text
    listed = written(encoding, monkeypatch, "list", str(tmp_path))
    assert "|d|" in listed
    assert "ROME" in listed


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_lists_survive_a_terminal_of_few_characters(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "f_learning/one_fit" in written(encoding, monkeypatch, "list", "--what", "configs")


def test_a_fit_needs_neither_a_locale_nor_unix(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in POOR.items():
        monkeypatch.setitem(os.environ, name, value)
    words = [sys.executable, "-c", PROGRAM, *fit(world, tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not [noise for noise in NOISE if noise in done.stderr]
    (results,) = tmp_path.rglob("results.json")
    peak = json.loads(results.read_text(encoding="utf-8"))["peak_memory_bytes"]
    assert (peak is None) != torch.cuda.is_available()
    (config,) = tmp_path.rglob("config.yaml")
    saved = yaml.safe_load(config.read_text(encoding="utf-8"))
    assert saved["model"]["init_args"]["kl_prompt"] == PROMPT
    (metrics,) = tmp_path.rglob("metrics.csv")
    names = next(csv.reader(metrics.read_text(encoding="ascii").splitlines()))
    assert {"p_target", "relative_norm"} <= set(names)
    assert all(re.fullmatch(r"[\w./]+", name, re.ASCII) for name in names)


def test_a_stream_that_knows_what_to_do_stays_as_it_is() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    spell_out(stream, io.StringIO())
    assert stream.errors == "replace"
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    spell_out(stream)
    stream.write("é … ‖Δ‖/‖W‖ ☃")
    assert isinstance(stream.buffer, io.BytesIO)
    assert stream.buffer.getvalue() == "é … |d|/|W| \\u2603".encode("cp1252")


def test_a_configuration_that_would_be_misread_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("# à\nseed_everything: 1\n", encoding="utf-8")
    assert run_here(["fit", "-c", str(file), "--print_config"]) == 0
    monkeypatch.setattr(locale, "getpreferredencoding", lambda do_setlocale: "cp1252")
    assert run_here(["fit", "-c", str(file), "--print_config"]) == 1
    assert "would be read as cp1252 here. Set the environment" in capsys.readouterr().err


def test_packaged_configurations_are_read_alike_everywhere() -> None:
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert path.read_bytes().isascii(), path.name
