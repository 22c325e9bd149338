# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors of other packages, which announce them by entry points."""

from __future__ import annotations

import inspect
import warnings
from importlib.metadata import entry_points

from lightning_edit.modules.base import EditModule

__all__ = ["GROUP", "foreign_editors"]

#: Group of the entry points, each of which names an editor.
GROUP = "lightning_edit.editors"


def foreign_editors() -> dict[str, type]:
    """Editors that installed packages announce, by the names of their classes.

    One that cannot be imported, or is no editor, is left out with a warning: it must not keep
    others from working.
    """
    found: dict[str, type] = {}
    for point in entry_points(group=GROUP):
        try:
            cls = point.load()
        except Exception as error:  # whatever another package raises
            warnings.warn(f"The editor {point.value} cannot be imported: {error!r}.", stacklevel=2)
            continue
        if not (inspect.isclass(cls) and issubclass(cls, EditModule)):
            warnings.warn(f"{point.value} of the group {GROUP} is no EditModule.", stacklevel=2)
            continue
        found[cls.__name__] = cls
    return found
