# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A preset as a file: settings with their reasons, under the table that was measured of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_edit.core.files import replacing

__all__ = ["write_preset"]


def write_preset(
    file: Path,
    method: str,
    model: str,
    settings: Mapping[str, tuple[object, str]],
    heading: Sequence[str],
    table: Sequence[Sequence[str]],
) -> None:
    """Writes a configuration as those in ``configs/method``, for ``fit -c FILE``.

    Args:
        file: Where to.
        method: Name of the editor's class.
        model: The model that the settings are for.
        settings: Argument to its value and the reason for it.
        heading: Lines of words over the table.
        table: Heads, then rows.

    Examples:
        >>> file = getfixture("tmp_path") / "rome.yaml"
        >>> rows = [["settings", "reliability"], ["the class's own", "0.90"]]
        >>> write_preset(file, "ROME", "tiny", {"layers": ([2], "traced")}, ["ROME."], rows)
        >>> print(file.read_text(encoding="utf-8"))
        # ROME.
        #
        # | settings | reliability |
        # |---|---|
        # | the class's own | 0.90 |
        model:
          class_path: ROME
          init_args:
            model: "tiny"
            layers: [2] # traced
        <BLANKLINE>
    """
    head, *rows = table
    lines = [*heading, "", _row(head), "|" + "---|" * len(head), *map(_row, rows)]
    comments = [f"# {line}".rstrip() for line in lines]
    # What is JSON is YAML, and stays on one line, where its reason has room.
    arguments = [f"    model: {_json(model)}"]
    arguments += [f"    {name}: {_json(v)} # {why}" for name, (v, why) in settings.items()]
    text = [*comments, "model:", f"  class_path: {method}", "  init_args:", *arguments]
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        part.write_text("\n".join(text) + "\n", encoding="utf-8")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
