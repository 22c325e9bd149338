# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors that other packages announce by entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from lightning_edit.artifacts import list_
from lightning_edit.modules import foreign
from lightning_edit.modules.fine_tuning.fine_tune import FineTune
from lightning_edit.modules.foreign import GROUP, foreign_editors


class Theirs(FineTune):
    """What somebody else has made."""


def test_announced_editors_are_listed_and_broken_ones_are_in_nobodys_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = [f"{__name__}:Theirs", "json:loads", "no_such_package:Editor"]
    points = [EntryPoint(f"n{i}", value, GROUP) for i, value in enumerate(values)]
    asked: list[Any] = []

    def announced(**kwargs: Any) -> list[EntryPoint]:
        asked.append(kwargs)
        return points

    monkeypatch.setattr(foreign, "entry_points", announced)
    with pytest.warns(UserWarning, match="EditModule|cannot be imported") as told:
        assert foreign_editors() == {"Theirs": Theirs}
    assert asked == [{"group": "lightning_edit.editors"}]
    not_editors, not_found = (str(warning.message) for warning in told)
    assert not_editors == "json:loads of the group lightning_edit.editors is no EditModule."
    assert not_found.startswith("The editor no_such_package:Editor cannot be imported")
    with pytest.warns(UserWarning, match="EditModule|cannot be imported"):
        [offer] = [o for o in list_(what="methods") if getattr(o, "name", "") == "Theirs"]
    assert getattr(offer, "summary", "") == "What somebody else has made."
