# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of the wrong type are named by every class that takes them."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from typing import Any, cast

import pytest

import lightning_edit
from lightning_edit.core.arguments import CheckedArguments
from lightning_edit.core.errors import EditError, SettingError
from lightning_edit.modules.arguments import arguments_of

WRONG: tuple[object, ...] = (3, "x", [1.5], {"a": object()}, object(), float("nan"), True, b"x")


def classes() -> list[type[CheckedArguments]]:
    found = [getattr(lightning_edit, name) for name in lightning_edit.__all__]
    checked = [c for c in found if inspect.isclass(c) and issubclass(c, CheckedArguments)]
    return [cls for cls in checked if not inspect.isabstract(cls)]


def test_a_value_of_another_type_is_named() -> None:
    made = classes()
    assert len(made) > 40
    refused: list[tuple[type, str, Exception]] = []
    for cls in made:
        for name in arguments_of(cast("Hashable", cls)):
            for value in WRONG:
                try:
                    cls(**{name: value})
                except (EditError, TypeError, ValueError) as error:
                    refused.append((cls, name, error))
    assert len(refused) > 1000
    for cls, name, told in refused:
        words = str(told)
        if isinstance(told, SettingError):
            is_clear = f"{cls.__name__}: `{name}` is expected to be" in words
        else:  # something else is missing, or a value is out of range
            is_clear = name in words or "required" in words or "Give one of them" in words
        assert is_clear, (cls.__name__, name, words)


def test_what_fits_is_taken() -> None:
    cls: Any = lightning_edit.ROME
    assert cls("smollm2", layers=(1, 2), lr=1, steps=3).layers == (1, 2)
    with pytest.raises(SettingError, match=r"ROME: `steps` is expected to be a whole number, but"):
        cls(steps="3")
    with pytest.raises(SettingError, match=r"ROME: `layers` is expected to be list\[int\] or null"):
        cls("smollm2", [1, "2"])
