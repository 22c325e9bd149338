# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What people import: every name is there, documented, and costs nothing until it is used."""

from __future__ import annotations

import doctest
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lightning_edit
from tests.contract.enumeration import arguments_of, documented_arguments
from tests.processes import LONG

ROOT = Path(__file__).parent.parent
NAMES = sorted(set(lightning_edit.__all__) - {"__version__"})
# What the project promises by name; more may be offered.
PROMISED = {
    "EditBatch",
    "EditCheckpoint",
    "EditEvaluator",
    "EditReport",
    "EditRequest",
    "FineTune",
    "Generality",
    "LoRA",
    "LocFT",
    "Locality",
    "Locator",
    "Portability",
    "Probe",
    "ROME",
    "Reliability",
    "TaskVectorForgetting",
    "WeightDelta",
}


def test_promised_names_are_there() -> None:
    assert set(NAMES) >= PROMISED
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", lightning_edit.__version__)
    assert set(lightning_edit.__all__) <= set(dir(lightning_edit))
    with pytest.raises(AttributeError, match="attribute Rome"):
        lightning_edit.Rome  # type: ignore[attr-defined]  # noqa: B018


def test_every_name_is_documented(subtests: pytest.Subtests) -> None:
    for name in NAMES:
        with subtests.test(name):
            value: Any = getattr(lightning_edit, name)
            assert value.__name__ == name
            doc = inspect.getdoc(value) or ""
            first = doc.partition("\n")[0]
            assert len(first) > 15
            assert first.endswith(".")
            if inspect.isclass(value):
                unknown = set(arguments_of(value)) - set(documented_arguments_of(value))
                assert not unknown, f"{name} does not document {unknown}"
            else:
                parameters = set(inspect.signature(value).parameters) - {"kwargs"}
                assert parameters <= set(documented_arguments(value)), name


def documented_arguments_of(cls: type) -> set[str]:
    return {name for owner in cls.__mro__ for name in documented_arguments(owner)}


def test_most_names_come_with_an_example() -> None:
    parser = doctest.DocTestParser()
    without = [
        name
        for name in NAMES
        if not parser.get_examples(inspect.getdoc(getattr(lightning_edit, name)) or "")
    ]
    assert len(without) < len(NAMES) / 2, without


def test_every_name_survives_being_sent_to_another_process() -> None:
    for name in NAMES:
        value = getattr(lightning_edit, name)
        assert pickle.loads(pickle.dumps(value)) is value, name  # noqa: S301 (our own bytes)


@pytest.mark.parametrize(
    "program",
    [
        "import lightning_edit",
        "import lightning_edit; dir(lightning_edit)",
        "from lightning_edit.__main__ import main; main(['--help'])",
        "from lightning_edit.__main__ import main; main(['--version'])",
        "from lightning_edit.__main__ import main; main(['fti'])",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(program: str) -> None:
    heavy = ("torch", "lightning", "transformers", "peft", "jsonargparse", "numpy")
    check = f"import sys; sys.exit(' '.join(m for m in {heavy} if m in sys.modules) or 0)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{program}; {check}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_types_are_shipped() -> None:
    assert (ROOT / "lightning_edit" / "py.typed").is_file()
    source = (ROOT / "lightning_edit" / "__init__.pyi").read_text(encoding="utf-8")
    for name in NAMES:
        assert re.search(rf"\b{name} as {name}\b", source), f"{name} is unknown to type checkers"
