# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What there is is listed, and saved edits wherever they lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_edit.artifacts import list_
from lightning_edit.artifacts.outcomes import Offer, SavedEdit
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError
from tests.artifacts.helpers import made_run


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _edits(folder: str) -> list[SavedEdit]:
    return [edit for edit in list_(folder) if isinstance(edit, SavedEdit)]


def test_list_of_saved_edits() -> None:
    first = made_run(folder="runs/10")
    made_run(folder="runs/2", seed=1)
    WeightDelta.load("runs/2/delta").save("runs/plain")
    WeightDelta({}).save("runs/.delta-half/delta")
    Path("runs/bad/delta").mkdir(parents=True)
    Path("runs/bad/delta/delta_config.json").write_text("{")
    edits = {str(edit.path): edit for edit in _edits("runs")}
    assert list(edits) == ["runs/10/delta", "runs/2/delta", "runs/bad/delta", "runs/plain"]
    one = edits["runs/10/delta"]
    assert one.requests == {"capital-velmora": "The capital of Velmora is → Kettleby (was Dorin)"}
    assert (one.method, one.base, one.date) == ("ROME", "base", "2026-01-02")
    assert one.norm == pytest.approx(first.norm())
    assert one.parameters == tuple(first.changes)
    assert "is damaged" in edits["runs/bad/delta"].problem
    plain = edits["runs/plain"]
    assert plain.requests == {"language-velmora": ""}
    assert plain.date[:2] == "20"
    assert plain.date != "2026-01-02"
    assert [edit.path for edit in _edits("runs/10/delta")] == [Path("runs/10/delta")]
    with pytest.raises(ArtifactError, match="There is no folder `nowhere`"):
        list_("nowhere")


def test_list_of_what_there_is() -> None:
    import lightning_edit

    offers = [offer for offer in list_() if isinstance(offer, Offer)]
    assert {offer.kind for offer in offers} == {
        "methods", "metrics", "data", "callbacks", "models", "configs"
    }  # fmt: skip
    assert all(offer.summary for offer in offers)
    named = {(offer.kind, offer.name) for offer in offers}
    assert len(named) == len(offers)
    for pair in (("methods", "ROME"), ("metrics", "Locality"), ("data", "CounterFact"),
                 ("callbacks", "EditReport"), ("configs", "data/zsre.yaml")):  # fmt: skip
        assert pair in named
    assert ("methods", "EditModule") not in named
    assert ("metrics", "ReadingMetric") not in named
    for offer in offers:
        if offer.kind == "methods":
            assert offer.name in lightning_edit.__all__
            assert offer.paper.startswith("https://arxiv.org/abs/")
    assert {offer for offer in offers if offer.kind == "data"} == set(list_(what="data"))
