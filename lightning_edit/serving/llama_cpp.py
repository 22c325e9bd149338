# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A running llama.cpp server, whose adapters are switched by their scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import ClassVar

from lightning_edit.core.errors import ServerError
from lightning_edit.serving.endpoint import Client
from lightning_edit.serving.server import JSON, Served

__all__ = ["LlamaCpp"]

HINT = "Start llama-server with `--lora FILE --no-cache-prompt`."

# Long enough that a server which keeps prompts has something to keep.
PROBE = "Which of these words has been read before? " * 2


@dataclass(frozen=True)
class LlamaCpp(Client):
    """llama.cpp's server, which reads adapters when it starts and switches them while it runs.

    An adapter's name is that of its file without ``.gguf``. All are loaded from the start, several
    by ``--lora ONE,TWO``; which of them answers, and how strongly, is set by requests. The server
    has to compute prompts anew (``--no-cache-prompt``): what it keeps of a prompt was computed with
    the adapters of that time, and is used with others all the same (llama.cpp, issue 26207).

    Args:
        url: Its address.
        timeout: Seconds to wait for it.
        api_key_env: Name of the environment variable with its key.

    References:
        https://github.com/ggml-org/llama.cpp/tree/master/tools/server
    """

    hint: ClassVar[str] = HINT

    url: str = "http://127.0.0.1:8080"

    def push(self, folder: Path, name: str) -> None:
        """Checks that the adapter is loaded; ``prefer`` or a request's ``fields`` switch it on.

        Raises:
            ServerError: If the server was started without it, or goes on with prompts that were
                computed with other adapters.
        """
        known = [one.name for one in self.served()]
        if name not in known:
            raise ServerError(
                f"llama.cpp reads adapters when it starts, and {self.url} was started without "
                f"`{name}` (it has {', '.join(known) or 'none'}). Start it with `--lora "
                f"{folder / name}.gguf --no-cache-prompt`, with all versions that are to be "
                "switched, separated by commas; then push again."
            )
        for _ in range(2):
            asked: JSON = {"prompt": PROBE, "n_predict": 1, "temperature": 0.0}
            answer = self.endpoint.post("/completion", asked)
        timings = answer.get("timings") if isinstance(answer, dict) else None
        if isinstance(timings, dict) and timings.get("cache_n"):
            raise ServerError(
                f"{self.url} keeps what it computed of a prompt with other adapters, so that it "
                "would go on to give the answers of before. Start it with `--no-cache-prompt`."
            )

    def pull(self, name: str) -> None:
        """Switches an adapter off; see ``LiveServer.pull``."""
        if any(one.name == name and one.scale for one in self.served()):
            self._set({name: 0.0})

    def served(self) -> list[Served]:
        """All adapters with their scales; see ``LiveServer.served``."""
        return [Served(name, path, scale) for _, name, path, scale in self._rows()]

    def prefer(self, name: str | None) -> None:
        """Sets the scale of one adapter to 1 and of all others to 0."""
        self._set({one: 1.0 if one == name else 0.0 for _, one, _, _ in self._rows()})

    def fields(self, name: str | None) -> Mapping[str, JSON]:
        """What a request has to say; see ``LiveServer.fields``."""
        # What is kept of a prompt, on servers that do, was computed with other adapters.
        scales: list[JSON] = [
            {"id": id_, "scale": 1.0 if one == name else 0.0} for id_, one, _, _ in self._rows()
        ]
        return {"lora": scales, "cache_prompt": False}

    def _set(self, scales: Mapping[str, float]) -> None:
        # What is left out of the list is switched off by the server.
        body: list[JSON] = [
            {"id": id_, "scale": scales.get(name, scale)} for id_, name, _, scale in self._rows()
        ]
        if body:
            self.endpoint.post("/lora-adapters", body)

    def _rows(self) -> list[tuple[int, str, str, float]]:
        answer = self.endpoint.get("/lora-adapters")
        if not isinstance(answer, list):
            raise ServerError(f"{self.url} answered /lora-adapters with no list. {HINT}")
        return [
            (
                int(str(row["id"])),
                _stem(str(row["path"])),
                str(row["path"]),
                float(str(row["scale"])),
            )
            for row in answer
            if isinstance(row, dict)
        ]


def _stem(path: str) -> str:
    """A file's name without its ending, on whichever system the server runs."""
    kind = PureWindowsPath if "\\" in path else PurePosixPath
    return kind(path).name.removesuffix(".gguf")
