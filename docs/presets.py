# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Every setting in which a preset differs from its class, with the reason.

mkdocs asks for the table while it builds, and ``python docs/presets.py`` prints it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import lightning_edit
from lightning_edit.presets import config_folder

__all__ = ["Setting", "class_defaults", "on_page_markdown", "settings_in", "table"]

PLACE = "{{ table of presets }}"
HEAD = "| configuration | setting | class | preset | why |\n|---|---|---|---|---|\n"


class Setting(NamedTuple):
    """A setting of a preset."""

    name: str
    value: Any
    reason: str


def settings_in(path: Path) -> list[Setting]:
    """The settings of a configuration's editor but for its model, with the comment behind each."""
    text = path.read_text(encoding="utf-8")
    comments = dict(re.findall(r"^    (\w+):.*? #\s*(.*)$", text, re.MULTILINE))
    settings = yaml.safe_load(text)["model"]["init_args"]
    return [
        Setting(name, value, comments.get(name, ""))
        for name, value in settings.items()
        if name != "model"
    ]


def class_defaults(cls: type) -> dict[str, Any]:
    """Arguments of an editor with a default, its own before those of its bases."""
    found: dict[str, Any] = {}
    required: set[str] = set()
    for owner in cls.__mro__:
        if owner.__module__.startswith("lightning_edit.") and "__init__" in vars(owner):
            for name, parameter in inspect.signature(vars(owner)["__init__"]).parameters.items():
                if parameter.default is parameter.empty:
                    required.add(name)
                elif name not in required:
                    found.setdefault(name, parameter.default)
    return found


def rows() -> Iterator[str]:
    folder = config_folder()
    for path in sorted((folder / "method").rglob("*.yaml")):
        section = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        defaults = class_defaults(getattr(lightning_edit, section["class_path"]))
        name = path.relative_to(folder).with_suffix("").as_posix()
        for setting in settings_in(path):
            if setting.name in defaults:
                default = defaults[setting.name]
                yield (
                    f"| `{name}` | `{setting.name}` | {cell(default)} | {cell(setting.value)} "
                    f"| {setting.reason} |"
                )


def cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("'", "")


def table() -> str:
    """Markdown: a row for each setting in which a preset differs from its class."""
    return HEAD + "\n".join(rows())


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs with the text of every page."""
    return markdown.replace(PLACE, table()) if PLACE in markdown else markdown


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
