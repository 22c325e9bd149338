# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Descriptions of saved edits that say something else, with the checksum of what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_edit.core.files import content_hash

__all__ = ["rewrite"]


def rewrite(folder: Path, *without: str, **values: Any) -> None:
    """Sets and leaves out parts of the description in a saved edit's folder."""
    path = folder / "delta_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | values
    config = {name: value for name, value in config.items() if name not in without}
    config["sha256"] = content_hash(config)
    path.write_text(json.dumps(config), encoding="utf-8")
