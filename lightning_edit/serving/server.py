# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What every server of models is asked for, whichever it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["JSON", "LiveServer", "Served", "pull_all"]

#: What JSON can say.
JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


@dataclass(frozen=True)
class Served:
    """One thing that a server answers with.

    Args:
        name: By which requests ask for it.
        path: Where the server read it.
        scale: How much of it requests get that name none; None where they get none of it.
        is_adapter: Whether it is an adapter or an edited model rather than the base.
    """

    name: str
    path: str = ""
    scale: float | None = None
    is_adapter: bool = True


class LiveServer(Protocol):
    """A server of one base model whose adapters change while it runs.

    All methods raise ``ServerError`` where the server does not answer or refuses.
    """

    def push(self, folder: Path, name: str) -> None:
        """Has an adapter loaded, beside what there is; requests get it by its name.

        Under a name that is loaded already it takes the place of what has the name.

        Args:
            folder: Of the adapter, as ``lightning-edit export`` writes it.
            name: By which requests ask for it.
        """

    def pull(self, name: str) -> None:
        """Has an adapter taken off; nothing happens where there is none of the name."""

    def served(self) -> list[Served]:
        """What requests can ask for."""

    def prefer(self, name: str | None) -> None:
        """Says what requests get that name no adapter; the base when None.

        Servers whose requests always name what they want have nothing to do.
        """

    def fields(self, name: str | None) -> Mapping[str, JSON]:
        """What a request has to say to be answered by an adapter, or by the base when None."""


def pull_all(server: LiveServer) -> list[str]:
    """Takes every adapter off a server, so that the base answers alone.

    Args:
        server: The server.

    Returns:
        The names of the adapters.
    """
    names = [one.name for one in server.served() if one.is_adapter]
    server.prefer(None)
    for name in names:
        server.pull(name)
    return names
