# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The verbs on saved edits are a command, whose options are their arguments."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_edit.__main__ import main
from lightning_edit.cli import console
from lightning_edit.cli.verbs import VERBS
from lightning_edit.core.errors import ArtifactError, EditError, ModelError
from lightning_edit.report import read_report
from lightning_edit.report.undo import apply_commands
from tests.artifacts.helpers import made_run, same_weights, weights

NAMES = [name for name, verb in VERBS.items() if verb.function]
NAMES += [f"{name} {own}" for name, verb in VERBS.items() for own in verb.verbs]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_commands_in_a_report_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_run()
    Path("base").rename("run/base")
    monkeypatch.chdir("run")
    for line in apply_commands(read_report(".")).splitlines():
        program, *words = shlex.split(line)
        assert program == "lightning-edit"
        monkeypatch.setattr("sys.argv", ["lightning-edit", *words])
        assert main(words) == 0
    assert same_weights(weights("restored"), weights("base"))
    assert not same_weights(weights("edited"), weights("base"))
    printed = capsys.readouterr().out
    assert "Wrote the edited model to edited" in printed
    assert "Wrote the restored model to restored" in printed


def test_an_error_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-edit"])
    assert main(["apply", "nowhere"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-edit apply: `nowhere` holds no saved edit")


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = console.parser("apply").parse_args(["d", "--force", "--no_check", "--dtype=bfloat16"])
    assert options.as_dict() == {
        "delta": "d", "model": None, "output": "edited", "dtype": "bfloat16", "check": False,
        "force": True,
    }  # fmt: skip
    assert console.parser("list").parse_args([]).as_dict() == {"folder": None, "what": "all"}
    assert console.parser("list").parse_args(["runs"]).folder == "runs"
    with pytest.raises(SystemExit):
        console.parser("export").parse_args(["d", "--to", "onnx"])
    assert "lora" in capsys.readouterr().err


@pytest.mark.parametrize("verb", NAMES)
def test_every_option_has_help(verb: str) -> None:
    parser = console.parser(verb)
    assert parser.description
    assert all(action.help for action in parser._actions)
    known = {action.dest for action in parser._actions} - {"help"}
    assert known == set(console.function_of(verb).__annotations__) - {"return"}


def test_verbs_raise_one_family() -> None:
    assert issubclass(ArtifactError, EditError)
    assert issubclass(ModelError, EditError)


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from lightning_edit.cli import console; console.parser('apply').format_help();"
        "import json; print(json.dumps('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
