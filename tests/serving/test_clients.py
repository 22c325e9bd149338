# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Clients say to each server what it wants to hear, and to their users what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_edit.core.errors import ServerError
from lightning_edit.serving import VLLM, LiveServer, Served, SGLang, TransformersServe, pull_all
from lightning_edit.serving.endpoint import API_KEY, Endpoint
from tests.serving.servers import Answer, sglang, speaking, transformers_serve, vllm

KINDS: list[tuple[Callable[[str], LiveServer], Callable[[dict[str, str]], Answer]]] = [
    (VLLM, vllm),
    (SGLang, sglang),
]


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    return folders


@pytest.mark.parametrize(("client", "kind"), KINDS)
def test_adapters_come_and_go(client: Any, kind: Any, adapters: list[Path]) -> None:
    loaded: dict[str, str] = {}
    with speaking(kind(loaded)) as (url, _):
        server: LiveServer = client(url)
        assert server.served() == [Served("base", "base", is_adapter=False)]
        server.push(adapters[0], "a")
        server.push(adapters[0], "b")
        server.push(adapters[1], "a")  # in place of what has the name
        assert loaded == {"a": str(adapters[1]), "b": str(adapters[0])}
        assert server.served()[1:] == [
            Served("b", str(adapters[0])), Served("a", str(adapters[1])),
        ] or server.served()[1:] == [
            Served("a", str(adapters[1])), Served("b", str(adapters[0])),
        ]  # fmt: skip
        named = server.fields("a")
        assert named in ({"model": "a"}, {"lora_path": "a"})
        assert server.fields(None) in ({"model": "base"}, {"lora_path": None})
        server.pull("a")
        server.pull("a")  # nothing is left of it
        assert list(loaded) == ["b"]
        assert pull_all(server) == ["b"]
        assert loaded == {}
        with pytest.raises(ServerError, match=r"(?i)no adapter"):
            server.push(adapters[0] / "nowhere", "a")


def test_transformers_serve_loads_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    loaded: list[str] = []
    with speaking(transformers_serve(loaded)) as (url, _):
        server: LiveServer = TransformersServe(url, base="smollm2")
        server.push(tmp_path, "a")
        assert loaded == [str(tmp_path)]
        assert server.served() == [Served("a", str(tmp_path))]
        assert server.fields("a") == {"model": str(tmp_path)}
        assert server.fields(None) == {"model": "smollm2"}
        with pytest.raises(ServerError, match=r"did not load .*: No config\.json\. Start it with"):
            server.push(tmp_path / "nowhere", "b")
        server.prefer(None)
        server.pull("a")
        assert server.served() == []


def test_a_server_without_adapters_is_told_how_to_start() -> None:
    def plain(method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "base", "parent": None}]}
        return 404, {"detail": "Not Found"}

    with speaking(plain) as (url, _):
        with pytest.raises(ServerError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
            VLLM(url).push(Path("a"), "a")
        with pytest.raises(ServerError, match=r"Not Found.*--enable-lora"):
            SGLang(url).push(Path("a"), "a")


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (200, "hello", "no list of models"),
        (200, {"data": None}, "no list of models"),
        (301, "", "sends elsewhere"),
        (401, {"error": "who are you"}, f"who are you. It wants a key: .* {API_KEY}"),
        (500, {"error": {"message": "out\n of \x1b[0m memory."}}, "500: out of ␛.0m memory. Start"),
        (503, "[" * 9, "503: .{9}. Start"),
    ],
)
def test_other_answers(status: int, answer: Any, message: str) -> None:
    with (
        speaking(lambda *_: (status, answer)) as (url, _),
        pytest.raises(ServerError, match=message),
    ):
        VLLM(url).served()


def test_no_server() -> None:
    with speaking(lambda *_: (200, {})) as (url, _):
        pass
    with pytest.raises(ServerError, match=rf"No server answers at {url} .* Start it, or give"):
        VLLM(url, timeout=5).served()


def test_a_server_that_does_not_answer() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"within 0\.05 seconds.*longer `timeout`"):
            VLLM(url, timeout=0.05).served()


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://a",
        "127.0.0.1:80",
        "",
        "http://",
        "http://u:secret@a",
        "http://a:b",
    ],
)
def test_addresses(url: str) -> None:
    with pytest.raises(ServerError, match="is no address of a server"):
        Endpoint(url)
    with pytest.raises(ServerError, match="positive"):
        Endpoint("http://a", timeout=0)


def test_a_key_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")

    def rude(method: str, path: str, body: Any) -> tuple[int, Any]:
        return 403, {"error": "s3cret is no key"}

    with speaking(rude) as (url, asked):
        server = VLLM(url, api_key_env="MY_KEY")
        with pytest.raises(ServerError, match="… is no key") as caught:
            server.served()
        assert asked[0]["key"] == "Bearer s3cret"
        assert "s3cret" not in f"{caught.value!r}{server!r}"
    with speaking(vllm({})) as (url, asked):
        VLLM(url).served()
        assert asked[0]["key"] is None
