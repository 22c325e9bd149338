# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The real vLLM gives the edited model's answers, and the base's again, without a restart.

Skipped unless the environment variable TEST_VLLM names its program, in an environment of its own,
as ``/opt/vllm/bin/vllm``: it asks for an older transformers than this package does. Its build for
the CPU will do.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import pytest

from lightning_edit import EditRequest, LoRA, load_model, load_tokenizer
from lightning_edit.artifacts import serve_patch
from lightning_edit.core.errors import ServerError
from lightning_edit.serving import VLLM, Deployment
from tests.serving.servers import ask

PROGRAM = os.environ.get("TEST_VLLM", "")
PROMPT = "The capital of France is"
PATIENCE = 600  # seconds for a start on a busy machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM, reason="TEST_VLLM names no program of vLLM"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The default model, served by vLLM."""
    folder = tmp_path_factory.mktemp("vllm")
    load_model("smollm2").save_pretrained(folder / "base")
    load_tokenizer("smollm2").save_pretrained(folder / "base")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [PROGRAM, "serve", str(folder / "base"), "--port", str(port), "--enable-lora"]
    command += ["--max-lora-rank", "64", "--max-loras", "2", "--max-model-len", "512"]
    command += ["--dtype", "float32", "--enforce-eager"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        began = time.monotonic()
        while not _answers(address):
            if server.poll() is not None or time.monotonic() - began > PATIENCE:
                pytest.fail((folder / "log").read_text()[-2000:])
            time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def _answers(url: str) -> bool:
    try:
        return bool(VLLM(url).served())
    except (ServerError, OSError, HTTPException):
        return False


def _says(url: str, name: str | None = None) -> str:
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, **VLLM(url).fields(name)}
    return str(ask(url, "/v1/completions", body)["choices"][0]["text"]).strip()


def test_versions_on_a_running_server(url: str, tmp_path: Path) -> None:
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    for answer in ("Rome", "Lyon"):
        editor = LoRA.from_model(model, tokenizer, preset="smollm2")
        edit = editor.edit(EditRequest("The capital of {} is", "France", answer))
        edit.save(tmp_path / answer)
    folder = str(tmp_path / "served")
    assert _says(url) == "Paris"

    with ThreadPoolExecutor(4) as users:
        for number, answer in enumerate(("Rome", "Lyon"), 1):
            asked = [users.submit(_says, url) for _ in range(6)]
            edits = [str(tmp_path / answer)]
            serve_patch("push", edits, "vllm", url, name="facts", folder=folder, share=0.5)
            assert [one.result() for one in asked] == ["Paris"] * 6  # none is lost
            assert _says(url, f"facts-v{number}") == answer
        # Not the base beside them: the build for the CPU adds an adapter to it in a mixed batch.
        names = ["facts-v1", "facts-v2"] * 6
        together = list(users.map(lambda name: _says(url, name), names))
        assert together == ["Rome", "Lyon"] * 6
        assert _says(url) == "Paris"

    serve_patch("undo", None, "vllm", url, name="facts", folder=folder)
    assert [one.name for one in VLLM(url).served() if one.is_adapter] == ["facts-v1"]
    assert (_says(url, "facts-v1"), _says(url)) == ("Rome", "Paris")
    serve_patch("pull", None, "vllm", url, name="facts", folder=folder)
    assert not [one for one in VLLM(url).served() if one.is_adapter]
    assert _says(url) == "Paris"
    assert not Deployment(folder, "facts").live
