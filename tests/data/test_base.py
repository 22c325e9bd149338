# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The data module: sources, choice of requests, old answers, and the hub."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lightning_edit.core.errors import MissingDependencyError, RequestError
from lightning_edit.core.request import EditRequest, Probe
from lightning_edit.data import EditDataModule, ZsRE, write_requests


def people(count: int) -> list[EditRequest]:
    return [
        EditRequest(f"Person {i} lives in", f"Person {i}", "Rome", target_old="Bath", id=f"p{i}")
        for i in range(count)
    ]


def ids(data: EditDataModule) -> list[str]:
    return [request.id for request in data.requests]


def test_a_file_and_an_inline_list_give_the_same(tmp_path: Path) -> None:
    write_requests(people(3), tmp_path / "a.jsonl")
    inline = EditDataModule(requests=people(3))
    read = EditDataModule(path=str(tmp_path / "a.jsonl"))
    assert read.requests == inline.requests == people(3)
    assert read.requests_sha256 == inline.requests_sha256


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"limit": 2}, ["p0", "p1"]),
        ({"offset": 3}, ["p3", "p4"]),
        ({"offset": 1, "limit": 2}, ["p1", "p2"]),
        ({"limit": 99}, ["p0", "p1", "p2", "p3", "p4"]),
        ({"ids": ["p3", "p1"]}, ["p3", "p1"]),
        ({"ids": ["p3", "p1"], "limit": 1}, ["p3"]),
    ],
)
def test_requests_are_chosen(kwargs: dict[str, Any], expected: list[str]) -> None:
    assert ids(EditDataModule(requests=people(5), **kwargs)) == expected


def test_a_seed_shuffles_once_and_alike() -> None:
    first = ids(EditDataModule(requests=people(50), seed=1))
    assert first == ids(EditDataModule(requests=people(50), seed=1))
    assert first != ids(EditDataModule(requests=people(50), seed=2))
    assert sorted(first) == sorted(ids(EditDataModule(requests=people(50))))
    assert ids(EditDataModule(requests=people(50), seed=1, offset=10, limit=5)) == first[10:15]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"path": "a.json"}, "got .*requests and path.*Give one"),
        ({"batch_size": 0}, "batch_size. .* at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size"),
        ({"limit": 0}, "limit. .* at least 1, got 0"),
        ({"offset": -1}, "offset. .* at least 0, got -1"),
    ],
)
def test_bad_arguments_are_told_at_once(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        EditDataModule(requests=people(1), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"requests": []}, "no edit requests"),
        (
            {"requests": people(2), "ids": ["p2"]},
            "no request of the given list has the id 'p2'.*p1",
        ),
        ({"requests": people(2), "offset": 2}, "offset. is 2, but the given list has 2 requests"),
        ({}, "EditDataModule has no requests. Give .path.*requests"),
        ({"requests": [people(1)[0], people(1)[0]]}, "share the id 'p0'"),
    ],
)
def test_what_cannot_be_carried_out_is_told_in_setup(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        EditDataModule(**kwargs).setup("fit")


def test_a_data_set_without_a_file_does_not_ask_for_inline_requests() -> None:
    with pytest.raises(RequestError, match=r"ZsRE has no requests. Give .path.*, or .hub.\.$"):
        ZsRE().setup("fit")


def zsre(number: int, **fields: Any) -> dict[str, Any]:
    record = {"subject": f"Ada {number}", "src": f"Where was Ada {number} born?", "alt": "Rome"}
    return {**record, **fields}


def test_invalid_records_are_counted_and_left_out_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([zsre(0), zsre(1, src="Who?"), zsre(2), zsre(3, alt=" ")]))
    with pytest.raises(
        RequestError, match=r"2 of 4 records of .* The first: zsre.json\[1\]: .*Ada 1"
    ):
        ZsRE(path=str(path)).setup("fit")
    with pytest.warns(UserWarning, match=r"Left out 2 of 4 records .* zsre.json\[1\]"):
        left = ZsRE(path=str(path), skip_invalid=True).requests
    assert [request.subject for request in left] == ["Ada 0", "Ada 2"]


def test_contradictions_are_left_out_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([zsre(0), zsre(0, alt="Bath"), zsre(1), zsre(0)]))
    with pytest.raises(RequestError, match=r"contradict.*skip_invalid"):
        ZsRE(path=str(path)).setup("fit")
    with pytest.warns(UserWarning, match="Left out 2 of 4 requests"):
        left = ZsRE(path=str(path), skip_invalid=True).requests
    assert [(r.subject, r.target_new) for r in left] == [("Ada 0", "Rome"), ("Ada 1", "Rome")]


def test_contradictions_outside_the_choice_do_no_harm() -> None:
    contrary = EditRequest("Person 0 lives in", "Person 0", "Bonn", id="contrary")
    data = EditDataModule(requests=[*people(2), contrary], limit=2)
    assert ids(data) == ["p0", "p1"]


def test_setup_reads_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_requests(people(2), tmp_path / "a.json")
    data = EditDataModule(path=str(tmp_path / "a.json"))
    data.setup("fit")
    (tmp_path / "a.json").unlink()
    data.setup("validate")
    assert ids(data) == ["p0", "p1"]


def test_old_requests_ask_for_the_old_answer() -> None:
    request = EditRequest(
        "Ada lives in",
        "Ada",
        "Rome",
        target_old="Bath",
        rephrases=("Ada's home is",),
        locality=(Probe("Tom lives in", "York"),),
        portability=(Probe("Ada's country is", "Italy", "one_hop"),),
    )
    data = EditDataModule(requests=[request], batch_size=2)
    (old,) = data.old_requests
    assert (old.target_new, old.target_old) == ("Bath", "Rome")
    assert (old.prompt, old.rephrases, old.locality) == (
        request.prompt,
        request.rephrases,
        request.locality,
    )
    assert old.portability == ()
    assert old.id != request.id
    assert list(data.old_dataloader()) == [[old]]


def test_old_requests_need_old_answers() -> None:
    request = EditRequest("Ada lives in", "Ada", "Rome", id="ada")
    with pytest.raises(RequestError, match=r"'ada'.*target_old"):
        _ = EditDataModule(requests=[request]).old_requests


def test_evaluation_is_shared_between_data_parallel_ranks_only() -> None:
    data = EditDataModule(requests=people(3), eval_batch_size=2)
    data.trainer = cast(Any, SimpleNamespace(distributed_sampler_kwargs=None))
    assert [len(batch) for batch in data.val_dataloader()] == [2, 1]
    # Two ranks that hold parts of the same tensors form one replica.
    data.trainer = cast(
        Any, SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 1, "rank": 0})
    )
    assert [len(batch) for batch in data.test_dataloader()] == [2, 1]
    data.trainer = cast(
        Any, SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 1})
    )
    assert [[request.id for request in batch] for batch in data.predict_dataloader()] == [["p1"]]


def test_a_hub_data_set_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    # The columns of a table are shared: what one record lacks is None in it.
    records = [zsre(0, loc="nq question: who sang it", loc_ans="Adele"), zsre(1, answers=["Bath"])]
    (folder / "test.json").write_text(json.dumps(records))
    data = ZsRE(hub=str(folder), split="test")
    data.prepare_data()
    data.setup("test")
    assert [r.target_old for r in data.requests] == [None, "Bath"]
    assert [len(r.locality) for r in data.requests] == [1, 0]

    (folder / "test.json").write_text(json.dumps([zsre(0), zsre(1, subject="Tom")]))
    with pytest.raises(RequestError, match=r"set\[1\]: the subject 'Tom'|set\[1\].*subject 'Tom'"):
        ZsRE(hub=str(folder), split="test").setup("test")


def test_a_revision_of_a_hub_data_set_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        calls.append((args, kwargs))
        return [zsre(0)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    ZsRE(hub="someone/zsre@1a2b", subset="eval").setup("fit")
    ZsRE(hub="someone/zsre", split="test").setup("fit")
    assert calls == [
        (("someone/zsre", "eval"), {"split": "train", "revision": "1a2b"}),
        (("someone/zsre", None), {"split": "test", "revision": None}),
    ]


def test_without_the_package_for_it_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"someone/set.*lightning-edit\[data\]"):
        EditDataModule(hub="someone/set").setup("fit")
