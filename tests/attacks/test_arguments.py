# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of the wrong type are named by every class that takes them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import lightning_edit
from lightning_edit.core.arguments import CheckedArguments
from lightning_edit.core.errors import EditError, SettingError
from lightning_edit.modules.arguments import arguments_of

WRONG: tuple[object, ...] = (3, "x", [1.5], {"a": object()}, object(), float("nan"), True, b"x")


def classes() -> list[Any]:
    found = [getattr(lightning_edit, name) for name in lightning_edit.__all__]
    checked = [c for c in found if inspect.isclass(c) and issubclass(c, CheckedArguments)]
    return [cls for cls in checked if not inspect.isabstract(cls)]


def test_a_value_of_another_type_is_named() -> None:
    made = classes()
    assert len(made) > 40
    refused = []
    for cls in made:
        for name in arguments_of(cls):
            for value in WRONG:
                try:
                    cls(**{name: value})
                except (EditError, TypeError, ValueError) as error:
                    refused.append((cls, name, error))
    assert len(refused) > 1000
    for cls, name, found in refused:
        words = str(found)
        if isinstance(found, SettingError):
            is_clear = f"{cls.__name__}: `{name}` is expected to be" in words
        else:  # something else is missing, or a value is out of range
            is_clear = name in words or "required" in words or "Give one of them" in words
        assert is_clear, (cls.__name__, name, words)


def test_what_fits_is_taken() -> None:
    rome: Any = lightning_edit.ROME
    assert rome("smollm2", layers=(1, 2), lr=1, steps=3).layers == (1, 2)
    with pytest.raises(SettingError, match=r"ROME: `steps` is expected to be a whole number, but"):
        rome(steps="3")
    with pytest.raises(SettingError, match=r"ROME: `layers` is expected to be list\[int\] or null"):
        rome("smollm2", [1, "2"])
