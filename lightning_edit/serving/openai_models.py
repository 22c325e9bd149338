# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The list of models that servers with the API of OpenAI give."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_edit.core.errors import ServerError
from lightning_edit.serving.endpoint import Endpoint
from lightning_edit.serving.server import Served

__all__ = ["base_of", "models_of"]


def models_of(endpoint: Endpoint) -> list[Served]:
    """Base models and adapters of a server; an adapter names its base as ``parent``.

    Raises:
        ServerError: If it does not answer, or with anything else than such a list.
    """
    answer = endpoint.get("/v1/models")
    rows = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(rows, list):
        raise ServerError(
            f"{endpoint.url} answered /v1/models with no list of models. It is another server. "
            f"{endpoint.hint}"
        )
    return [
        Served(str(row["id"]), str(row.get("root") or ""), is_adapter=bool(row.get("parent")))
        for row in rows
        if isinstance(row, dict) and "id" in row
    ]


def base_of(served: Sequence[Served], url: str) -> str:
    """The name of the base model.

    Raises:
        ServerError: If the server has none.
    """
    for one in served:
        if not one.is_adapter:
            return one.name
    raise ServerError(f"{url} lists no base model at /v1/models.")
