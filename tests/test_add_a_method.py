# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What docs/add_a_method.md says, done to the letter in a copy of the tree: all must be green."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.processes import run_module

ROOT = Path(__file__).parent.parent
FOLDERS = ("lightning_edit", "tests", "configs", "docs", "examples", "benchmarks")
METHOD = "lightning_edit/modules/fine_tuning/one_step.py"
TEST = "tests/modules/fine_tuning/test_one_step.py"
CONFIG = "configs/method/one_step.yaml"
# What looks at the tree as a whole, what enumerates methods, and the method's own tests.
WHOLE = ("test_rooms", "test_composition", "test_reference", "test_public_api")
NAMED = ("public_name", "navigation", "language", "OneStep", "one_step", "there_is_something")
CHECKS = (
    *(f"tests/{name}.py" for name in WHOLE),
    *("tests/test_readme.py", "tests/contract", TEST),
    *("-k", " or ".join([*WHOLE, *NAMED])),
)
# Plugins of pytest are imported already in the process that is forked.
NESTED = ("--assert=plain", "-m", "not slow")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with the method of the page in it."""
    copy = tmp_path_factory.mktemp("tree")
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "written_before")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    page = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```(python|yaml)\n(.*?)^ *```$", page, re.MULTILINE | re.DOTALL)
    [method] = [text for kind, text in blocks if kind == "python" and "class OneStep" in text]
    [test] = [text for kind, text in blocks if kind == "python" and "def test_" in text]
    [config] = [text for kind, text in blocks if kind == "yaml"]
    [line] = re.findall(r"`(from \.modules\S+ import OneStep as OneStep)`", page)
    demos = "from lightning_edit.demos"
    (copy / METHOD).write_text(method, encoding="utf-8")
    (copy / TEST).write_text(
        test.replace(demos, f"from lightning_edit import OneStep\n{demos}"), encoding="utf-8"
    )
    (copy / CONFIG).write_text(re.sub("^   ", "", config, flags=re.MULTILINE), encoding="utf-8")
    stub = copy / "lightning_edit" / "__init__.pyi"
    names = stub.read_text(encoding="utf-8")
    stub.write_text(names.replace("from .modules.base", f"{line}\nfrom .modules.base", 1), "utf-8")
    return copy


def run(tree: Path, *words: str) -> None:
    """Runs a Python module in the copy, and shows what it says where it fails."""
    done = run_module(tree, *words)
    assert not done.returncode, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_method_is_tidy(tree: Path) -> None:
    run(tree, "ruff", "check", METHOD, TEST)
    run(tree, "ruff", "format", "--check", METHOD, TEST)


@pytest.mark.slow
def test_its_types_are_right(tree: Path) -> None:
    run(tree, "mypy", METHOD, TEST)


def test_all_that_is_derived_of_it_is_green(tree: Path) -> None:
    run(tree, "pytest", "-q", "-p", "no:cacheprovider", *NESTED, *CHECKS)


def test_the_command_line_knows_it(tree: Path) -> None:
    run(tree, "lightning_edit", "fit", "-c", "edit", "-c", "method/one_step", "--print_config")
