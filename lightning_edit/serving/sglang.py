# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A running SGLang, whose adapters are loaded and unloaded by its API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lightning_edit.core.errors import ServerError
from lightning_edit.rendering.escaping import visible
from lightning_edit.serving.endpoint import Client
from lightning_edit.serving.openai_models import models_of
from lightning_edit.serving.server import JSON, Served

__all__ = ["SGLang"]

HINT = (
    "Start SGLang with `--enable-lora --max-lora-rank N --lora-target-modules all`, where it can "
    "read the adapter's folder."
)


@dataclass(frozen=True)
class SGLang(Client):
    """SGLang's server.

    Args:
        url: Its address.
        timeout: Seconds to wait for it.
        api_key_env: Name of the environment variable with its key.

    References:
        https://docs.sglang.ai/advanced_features/lora.html
    """

    hint: ClassVar[str] = HINT

    url: str = "http://127.0.0.1:30000"

    def push(self, folder: Path, name: str) -> None:
        """Has an adapter loaded; see ``LiveServer.push``.

        What has the name is unloaded first, so that requests of that moment are refused. Give each
        version a name of its own, as ``Deployment`` does.
        """
        self.pull(name)
        self._change("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def pull(self, name: str) -> None:
        """Has an adapter taken off; see ``LiveServer.pull``."""
        if any(one.name == name for one in self.served()):
            self._change("/unload_lora_adapter", {"lora_name": name})

    def served(self) -> list[Served]:
        """What requests can ask for; see ``LiveServer.served``."""
        return models_of(self.endpoint)

    def prefer(self, name: str | None) -> None:
        """Nothing: every request names its adapter, or gets the base."""

    def fields(self, name: str | None) -> Mapping[str, JSON]:
        """What a request has to say; see ``LiveServer.fields``."""
        return {"lora_path": name}

    def _change(self, path: str, body: dict[str, JSON]) -> None:
        answer = self.endpoint.post(path, body)
        # Some versions say of a failure with status 200.
        if isinstance(answer, dict) and answer.get("success") is False:
            message = visible(str(answer.get("error_message", ""))[:300]).rstrip(".")
            raise ServerError(f"{self.url} answered {path}: {message}. {HINT}")
