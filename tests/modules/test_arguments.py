# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments of editors: the error names the editor and what was meant."""

from __future__ import annotations

from typing import Any

import pytest

import lightning_edit
from lightning_edit import IKE, MEMIT, SCR
from tests.contract.enumeration import EDITORS, LEARNERS


def test_a_misspelt_argument_is_named_with_the_one_that_was_meant() -> None:
    with pytest.raises(TypeError, match=r"MEMIT has no argument `stepz`.*`steps`"):
        MEMIT("smollm2", stepz=3)
    for name, cls in {**EDITORS, **LEARNERS}.items():
        wrong: dict[str, Any] = {"dtpye": "float32"}
        if name == "TrainedEditor":
            wrong["checkpoint"] = ""
        with pytest.raises(TypeError, match=f"{name} has no argument `dtpye`.*`dtype`"):
            cls(**wrong)


@pytest.mark.parametrize("cls", [IKE, SCR])
def test_an_argument_without_use_is_refused(cls: type[lightning_edit.EditModule]) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__} has no use for `layers`"):
        cls(layers=[3])
    assert cls(layers=None).layers is None
