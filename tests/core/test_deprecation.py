# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Deprecated names warn where they are used, and are gone when they said."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

import lightning_edit
from lightning_edit.core.deprecation import deprecated

PACKAGE = Path(lightning_edit.__file__).parent


@deprecated(since="0.2", removed="0.4", instead="`new`")
def old(a: int, *, b: int = 1) -> int:
    """Adds."""
    return a + b


@deprecated(since="0.2", removed="0.4", instead="`New`")
class Old:
    """Holds a number."""

    def __init__(self, a: int) -> None:
        self.a = a


def test_a_function_warns_where_it_is_called() -> None:
    with pytest.warns(FutureWarning, match="`old` is deprecated since 0.2 and will be") as caught:
        assert old(1, b=2) == 3
    assert caught[0].filename == __file__
    assert (old.__name__, old.__doc__) == ("old", "Adds.")


def test_a_class_warns_when_it_is_made_or_subclassed() -> None:
    with pytest.warns(FutureWarning, match="gone in 0.4. Use `New` instead"):
        made = Old(3)
    assert made.a == 3
    assert isinstance(made, Old)
    with pytest.warns(FutureWarning, match="`Old` is deprecated"):

        class New(Old):
            """Of its own."""

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert New(4).a == 4


def due(source: str, version: Version) -> Iterator[str]:
    """Versions in which something was to be gone, but is not."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("deprecated"):
            given = {k.arg: k.value for k in node.keywords}
            if "removed" in given and Version(ast.literal_eval(given["removed"])) <= version:
                yield ast.literal_eval(given["removed"])


def test_what_is_due_is_gone() -> None:
    version = Version(Version(lightning_edit.__version__).base_version)
    for path in PACKAGE.rglob("*.py"):
        if path.name != "deprecation.py":  # its example is of any time
            assert not list(due(path.read_text("utf-8"), version)), path.name
    mark = '@deprecated(since="0.2", removed="0.4", instead="x")\ndef f(): ...\n'
    assert list(due(mark, Version("0.3.9"))) == []
    assert list(due(mark, Version("0.4"))) == ["0.4"]
