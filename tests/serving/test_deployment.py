# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Versions on a server: shares, undo, and a record that is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_edit.core.errors import ServerError
from lightning_edit.serving import VLLM, Deployment, choose
from lightning_edit.serving.deployment import RECORD
from tests.serving.servers import speaking, vllm


def _write(folder: Path, name: str) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(f'"{name}"')


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    made = Deployment(tmp_path / "served", "facts")
    for _ in range(3):
        made.add(_write)
    return made


def test_versions_share_and_come_back(deployment: Deployment) -> None:
    loaded: dict[str, str] = {}
    with speaking(vllm(loaded)) as (url, asked):
        server = VLLM(url)
        deployment.push(server, 1)
        assert deployment.live == {"facts-v1": 1.0}
        deployment.push(server, 2, share=0.25)
        assert deployment.live == {"facts-v1": 0.75, "facts-v2": 0.25}
        deployment.push(server, share=0.5)
        assert deployment.live == {"facts-v1": 0.375, "facts-v2": 0.125, "facts-v3": 0.5}
        assert set(loaded) == {"facts-v1", "facts-v2", "facts-v3"}
        assert all(Path(path).is_absolute() for path in loaded.values())
        deployment.undo(server)
        assert deployment.live == {"facts-v1": 0.75, "facts-v2": 0.25}
        assert set(loaded) == {"facts-v1", "facts-v2"}
        deployment.undo(server)
        assert deployment.live == {"facts-v1": 1.0}
        deployment.push(server, 3)
        # That before stays for requests that ask for it, till the next push.
        assert set(loaded) == {"facts-v1", "facts-v3"}
        deployment.push(server, 2)
        assert set(loaded) == {"facts-v2", "facts-v3"}
        deployment.pull(server)
        assert deployment.live == {}
        assert loaded == {}
        again = Deployment(deployment.folder, "facts")
        assert (again.live, again.versions) == ({}, deployment.versions)
        again.undo(server)
        assert again.live == {"facts-v2": 1.0}
        # What is new is loaded before what is old is taken off.
        last = [row["path"] for row in asked if "load" in row["path"]][-1]
        assert last == "/v1/load_lora_adapter"
        for _ in range(3):
            again.undo(server)
        assert (again.live, loaded) == ({}, {})
        with pytest.raises(ServerError, match="nothing to undo"):
            again.undo(server)


def test_what_a_server_refuses_changes_nothing(deployment: Deployment) -> None:
    loaded: dict[str, str] = {}
    with speaking(vllm(loaded)) as (url, _):
        server = VLLM(url)
        deployment.push(server, 1)
        record = (deployment.folder / RECORD).read_text()
        with pytest.raises(ServerError, match="no version 7"):
            deployment.push(server, 7)
        with pytest.raises(ServerError, match="`share` is expected"):
            deployment.push(server, 2, share=0.0)
        (deployment.folder / "v2" / "adapter_config.json").write_text('"other"')
        with pytest.raises(ServerError, match="not those that were written"):
            deployment.push(server, 2)
        elsewhere = Deployment(deployment.folder, "facts", seen_as="/mnt")
        with pytest.raises(ServerError, match="No adapter found"):
            elsewhere.push(server, 3)
        assert list(loaded) == ["facts-v1"]
    with pytest.raises(ServerError, match="No server answers"):
        deployment.undo(VLLM(url))
    assert (deployment.folder / RECORD).read_text() == record
    assert Deployment(deployment.folder, "facts").live == deployment.live == {"facts-v1": 1.0}
    assert not deployment.history[-1]["undone"]


def test_the_server_may_see_another_path(deployment: Deployment) -> None:
    other = Deployment(deployment.folder, "facts", seen_as="/mnt/served")
    assert str(other.seen_path_of(other.version(2))) == "/mnt/served/v2"


@pytest.mark.parametrize("name", ["", "a/b", "..", "a.b", "-a", "ä", "a" * 65, "a\n"])
def test_names_become_paths(name: str, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="letters, digits"):
        Deployment(tmp_path, name)


def test_damaged_records(deployment: Deployment) -> None:
    path = deployment.folder / RECORD
    whole = json.loads(path.read_text())
    with pytest.raises(ServerError, match="holds versions of `facts`, not of `other`"):
        Deployment(deployment.folder, "other")
    escaped = {**whole["versions"][0], "number": "../../etc"}
    for damaged in (
        "{", "[]", "{}", json.dumps({**whole, "format_version": 2}),
        json.dumps({**whole, "versions": [escaped]}), json.dumps({**whole, "live": [1]}),
    ):  # fmt: skip
        path.write_text(damaged)
        with pytest.raises(ServerError, match="is damaged"):
            Deployment(deployment.folder, "facts")


def test_a_stopped_write_leaves_its_folder_alone(deployment: Deployment) -> None:
    (deployment.folder / "v4").mkdir()
    assert deployment.add(_write).name == "facts-v5"


# -- the router ------------------------------------------------------------------------------


def test_keys_are_shared_out_and_stay() -> None:
    keys = [f"user {i}" for i in range(4000)]
    before = {"a": 0.5, "b": 0.25}
    first = [choose(before, key) for key in keys]
    assert first == [choose({"b": 0.25, "a": 0.5}, key) for key in keys]
    for name, share in ((None, 0.25), ("a", 0.5), ("b", 0.25)):
        assert abs(first.count(name) / len(keys) - share) < 0.04
    second = [choose({"a": 0.5, "b": 0.5}, key) for key in keys]
    moves = {(old, new) for old, new in zip(first, second, strict=True) if old != new}
    assert moves <= {(None, "a"), (None, "b"), ("a", "b")}  # away from the base, or to b
    assert {choose({"a": 1.0}, key) for key in keys} == {"a"}
    assert {choose({}, key) for key in keys} == {None}
    assert choose({"a": 0.5}, "\ud800") in (None, "a")
    for shares in ({"a": 1.1}, {"a": -0.1, "b": 0.5}, {"a": 0.6, "b": 0.6}, {"a": float("nan")}):
        with pytest.raises(ServerError, match="between 0 and 1"):
            choose(shares, "key")
