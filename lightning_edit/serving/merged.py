# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A running ``transformers serve``, which loads a whole edited model from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from lightning_edit.core.errors import ServerError
from lightning_edit.rendering.escaping import visible
from lightning_edit.serving.endpoint import Client
from lightning_edit.serving.server import JSON, Served

__all__ = ["TransformersServe"]

HINT = "Start it with `transformers serve`, where it can read the model's folder."


@dataclass(frozen=True)
class TransformersServe(Client):
    """The server of transformers: requests name the folder of a model, which is loaded for them.

    It takes no adapters, so that what is pushed is the edited model, as ``apply`` writes it. The
    server frees a model that was not asked for in a while, so there is nothing to pull.

    Args:
        url: Its address.
        timeout: Seconds to wait for it, the loading included.
        api_key_env: Name of the environment variable with its key, where something before the
            server wants one.
        base: Name of the unedited model.
        folders: Name of each model that was pushed to its folder.

    References:
        https://huggingface.co/docs/transformers/serving
    """

    hint: ClassVar[str] = HINT

    url: str = "http://127.0.0.1:8000"
    timeout: float = 600.0
    base: str = ""
    folders: dict[str, str] = field(default_factory=dict)

    def push(self, folder: Path, name: str) -> None:
        """Has a model loaded, so that the first request does not wait for it."""
        answer = self.endpoint.post("/load_model", {"model": str(folder)})
        events = [answer] if isinstance(answer, dict) else _events(str(answer))
        last = events[-1] if events else {}
        if last.get("status") != "ready":
            message = visible(str(last.get("message", "it did not say why"))[:300]).rstrip(".")
            raise ServerError(f"{self.url} did not load `{folder}`: {message}. {HINT}")
        self.folders[name] = str(folder)

    def pull(self, name: str) -> None:
        """Forgets the name; the server frees the model when nobody asks for it."""
        self.folders.pop(name, None)

    def served(self) -> list[Served]:
        """What was pushed by ``folders``: the server tells of models of the hub alone."""
        self.endpoint.get("/health")
        return [Served(name, folder) for name, folder in self.folders.items()]

    def prefer(self, name: str | None) -> None:
        """Nothing: every request names its model."""

    def fields(self, name: str | None) -> Mapping[str, JSON]:
        """What a request has to say; see ``LiveServer.fields``."""
        return {"model": self.base if name is None else self.folders[name]}


def _events(text: str) -> list[dict[str, JSON]]:
    """The events of a stream of them."""
    found = []
    for line in text.splitlines():
        if line.startswith("data:"):
            try:
                event = json.loads(line.removeprefix("data:"))
            except ValueError:
                continue
            found += [event] if isinstance(event, dict) else []
    return found
