# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Facts: which of the packaged facts are kept. The files are stand-ins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_edit.core.errors import RequestError
from lightning_edit.data import Facts, facts, write_requests
from tests.data.test_base import ids, people


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write_requests(people(4), tmp_path / "facts.jsonl")
    known = {"smollm2": ["p0", "p2", "p3"], "demo": ["p2"]}
    (tmp_path / "facts_known.json").write_text(json.dumps(known))
    monkeypatch.setattr(facts, "files", lambda package: tmp_path)
    facts._known.cache_clear()
    yield
    facts._known.cache_clear()


def test_facts_are_kept_by_what_a_model_knows() -> None:
    assert ids(Facts()) == ["p0", "p2", "p3"]
    assert ids(Facts(known_to=None)) == ["p0", "p1", "p2", "p3"]
    assert ids(Facts(demo=True)) == ["p2"]
    assert ids(Facts(known_to=None, demo=True)) == ["p2"]
    assert ids(Facts(offset=1, limit=1)) == ["p2"]


def test_facts_name_the_old_answers_too() -> None:
    assert {request.target_new for request in Facts().old_requests} == {"Bath"}


def test_another_file_is_read_whole(tmp_path: Path) -> None:
    write_requests(people(2), tmp_path / "other.yaml")
    assert ids(Facts(path=str(tmp_path / "other.yaml"))) == ["p0", "p1"]


def test_an_unknown_model_is_told() -> None:
    with pytest.raises(RequestError, match=r"known_to. .* one of smollm2 or null, but got 'gpt9'"):
        Facts(known_to="gpt9").setup("fit")
    with pytest.raises(RequestError, match="no request of the packaged facts has the id 'p1'"):
        Facts(ids=["p1"]).setup("fit")
