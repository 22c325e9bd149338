# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The facts that come with the package: true, checkable, and known to the default model."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import as_file, files
from typing import Any, ClassVar

from lightning_edit.core.errors import RequestError
from lightning_edit.data.base import EditDataModule
from lightning_edit.data.json import read_records
from lightning_edit.data.records import Record

__all__ = ["Facts"]


class Facts(EditDataModule):
    """The package's own facts, each with a false target, rephrases and probes of every kind.

    An edit shows only where the model knew the fact before: by default only those facts are kept
    that the default model answers rightly.

    Args:
        known_to: Keep the facts that this model knows; all facts when null.
        demo: Keep only the ten facts of the demonstration, whatever ``known_to`` says.
        kwargs: Arguments of [`EditDataModule`][lightning_edit.EditDataModule]; a ``path`` or
            ``hub`` replaces the packaged facts, and is read whole.

    Raises:
        RequestError: From ``setup``, if it is not recorded what ``known_to`` knows.

    Examples:
        >>> data = Facts(demo=True)
        >>> len(data.requests)
        10
        >>> all(request.target_old for request in data.requests)
        True
    """

    own_source: ClassVar[str] = "the packaged facts"

    def __init__(self, known_to: str | None = "smollm2", demo: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.known_to = known_to
        self.demo = demo

    def read_records(self) -> list[tuple[str, Record]]:
        """Reads the packaged facts that are to be kept, or all those of ``path`` or ``hub``."""
        if self.path is not None or self.hub is not None:
            return super().read_records()
        with as_file(files("lightning_edit.data") / "facts.jsonl") as path:
            records = read_records(path)
        if (name := "demo" if self.demo else self.known_to) is None:
            return records
        known = _known()
        if name not in known:
            models = ", ".join(sorted(set(known) - {"demo"}))
            raise RequestError(
                f"`known_to` is expected to be one of {models} or null, but got {name!r}."
            )
        return [(where, record) for where, record in records if record["id"] in known[name]]


@cache
def _known() -> dict[str, frozenset[str]]:
    content = (files("lightning_edit.data") / "facts_known.json").read_text(encoding="utf-8")
    return {name: frozenset(ids) for name, ids in json.loads(content).items()}
