# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What the package offers, and that offering it costs nothing."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import lightning_edit


@pytest.mark.parametrize("name", sorted(set(lightning_edit.__all__) - {"__version__"}))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    thing = getattr(lightning_edit, name)
    assert inspect.getdoc(thing)
    assert name in dir(lightning_edit)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ROMEO'"):
        _ = lightning_edit.ROMEO


@pytest.mark.parametrize(
    "code",
    [
        "import lightning_edit",
        "from lightning_edit.__main__ import main; main(['--help'])",
        "from lightning_edit.__main__ import main; main(['--version'])",
        "from lightning_edit.__main__ import main; main(['fitt'])",
    ],
)
def test_help_does_not_wait_for_torch(code: str) -> None:
    script = f"{code}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def test_an_unknown_verb_is_said_and_a_near_one_named() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lightning_edit", "exprot"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert "Did you mean `export`?" in result.stderr
