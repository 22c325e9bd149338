# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Servers to put adapters on: llama.cpp's own, and small ones that speak as others do."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

__all__ = ["Answer", "ask", "llama_server", "sglang", "speaking", "transformers_serve", "vllm"]

#: Method, path and body to status and answer.
Answer = Callable[[str, str, Any], tuple[int, Any]]


@contextmanager
def speaking(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers by a function; gives its address and the list of what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            key = self.headers.get("Authorization")
            asked.append({"method": self.command, "path": self.path, "body": body, "key": key})
            status, found = answer(self.command, self.path, body)
            data = found.encode() if isinstance(found, str) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _answer  # noqa: N815 (names of http.server)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _rows(loaded: dict[str, str]) -> dict[str, Any]:
    rows = [{"id": "base", "object": "model", "root": "base", "parent": None}]
    rows += [{"id": n, "object": "model", "root": p, "parent": "base"} for n, p in loaded.items()]
    return {"object": "list", "data": rows}


def _is_adapter(path: str) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def vllm(loaded: dict[str, str]) -> Answer:
    """vLLM 0.11 and later, with runtime updating of adapters allowed."""

    def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
        def error(status: int, message: str) -> tuple[int, Any]:
            return status, {"error": {"message": message, "type": "BadRequest", "code": status}}

        if (method, path) == ("GET", "/v1/models"):
            return 200, _rows(loaded)
        if method != "POST" or path not in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            return 404, {"detail": "Not Found"}
        name = body["lora_name"]
        if path == "/v1/unload_lora_adapter":
            if name not in loaded:
                return error(404, f"The lora adapter '{name}' cannot be found.")
            del loaded[name]
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        if name in loaded and not body.get("load_inplace"):
            return error(400, f"The lora adapter '{name}' has already been loaded.")
        if not _is_adapter(body["lora_path"]):
            return error(404, f"Loading lora {name} failed: No adapter found")
        loaded[name] = body["lora_path"]
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    return answer


def sglang(loaded: dict[str, str]) -> Answer:
    """SGLang 0.5, started with adapters enabled."""

    def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
        if (method, path) == ("GET", "/v1/models"):
            return 200, _rows(loaded)
        if method != "POST" or path not in ("/load_lora_adapter", "/unload_lora_adapter"):
            return 404, {"detail": "Not Found"}
        name, message = body["lora_name"], ""
        if path == "/unload_lora_adapter":
            message = "" if loaded.pop(name, None) else f"LoRA adapter {name} is not loaded."
        elif name in loaded:
            message = f"LoRA adapter {name} is already loaded."
        elif not _is_adapter(body["lora_path"]):
            message = "No adapter_config.json."
        else:
            loaded[name] = body["lora_path"]
        done = {"success": not message, "error_message": message, "loaded_adapters": dict(loaded)}
        return (400 if message else 200), done

    return answer


def transformers_serve(loaded: list[str]) -> Answer:
    """``transformers serve`` of transformers 5."""

    def answer(method: str, path: str, body: Any) -> tuple[int, Any]:
        if (method, path) == ("GET", "/health"):
            return 200, {"status": "ok"}
        if (method, path) != ("POST", "/load_model"):
            return 404, {"detail": "Not Found"}
        if not (Path(body["model"]) / "config.json").is_file():
            events = [{"status": "error", "model": body["model"], "message": "No config.json"}]
        else:
            loaded.append(body["model"])
            events = [{"status": "loading", "progress": 1}, {"status": "ready", "cached": False}]
        return 200, "".join(f"data: {json.dumps(event)}\n\n" for event in events)

    return answer


@contextmanager
def llama_server(model: Path, adapters: Sequence[Path] = (), **settings: Any) -> Iterator[str]:
    """A real server of llama.cpp in this process; gives its address."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's server, xllamacpp, is absent")
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 2, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup, params.cache_prompt, params.verbosity = False, False, 0
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0) for path in adapters]
    for name, value in settings.items():
        setattr(params, name, value)
    server = xllamacpp.Server(params)
    try:
        yield server.listening_address
    finally:
        del server


def ask(url: str, path: str, body: Any) -> Any:
    """What a server answers to a request of a user, not by our clients."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    found = json.loads(response.read())
    connection.close()
    return found
