# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A running vLLM, whose adapters are loaded and unloaded by its API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lightning_edit.serving.endpoint import Client
from lightning_edit.serving.openai_models import base_of, models_of
from lightning_edit.serving.server import JSON, Served

__all__ = ["VLLM"]

HINT = (
    "Start vLLM with `--enable-lora --max-lora-rank N` and the environment variable "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, where it can read the adapter's folder."
)


@dataclass(frozen=True)
class VLLM(Client):
    """vLLM's OpenAI-compatible server.

    Args:
        url: Its address.
        timeout: Seconds to wait for it.
        api_key_env: Name of the environment variable with its key.

    References:
        https://docs.vllm.ai/en/latest/features/lora/
    """

    hint: ClassVar[str] = HINT

    url: str = "http://127.0.0.1:8000"

    def push(self, folder: Path, name: str) -> None:
        """Has an adapter loaded; see ``LiveServer.push``."""
        body: dict[str, JSON] = {"lora_name": name, "lora_path": str(folder)}
        if any(one.name == name for one in self.served()):
            body["load_inplace"] = True
        self.endpoint.post("/v1/load_lora_adapter", body)

    def pull(self, name: str) -> None:
        """Has an adapter taken off; see ``LiveServer.pull``."""
        if any(one.name == name for one in self.served()):
            self.endpoint.post("/v1/unload_lora_adapter", {"lora_name": name})

    def served(self) -> list[Served]:
        """What requests can ask for; see ``LiveServer.served``."""
        return models_of(self.endpoint)

    def prefer(self, name: str | None) -> None:
        """Nothing: every request names its model."""

    def fields(self, name: str | None) -> Mapping[str, JSON]:
        """What a request has to say; see ``LiveServer.fields``."""
        return {"model": name or base_of(self.served(), self.url)}
