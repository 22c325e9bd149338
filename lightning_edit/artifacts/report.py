# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The report of a run, written again."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning_edit.artifacts.outcomes import Rendered

__all__ = ["report"]


def report(
    folder: str, format: Literal["html", "md", "json", "latex", "csv", "all"] = "all"
) -> Rendered:
    """Writes the report of a run again, from its `results.json`; or gives its table as text.

    Args:
        folder: Folder of the run.
        format: `html`, `md` and `json` write that file; `all` writes every file of the report;
            `latex` and `csv` write none but give the table of the metrics.

    Returns:
        The report, and what was made of it.

    Raises:
        ArtifactError: If the folder holds no report, or a damaged one.
    """
    from lightning_edit.report import metrics_table, read_report, write_results
    from lightning_edit.report.files import EDITS, FILES, RESULTS, is_foreign_card

    found = read_report(folder)
    if format in ("latex", "csv"):
        return Rendered(found, text=metrics_table(found, format))
    files = {"html": ("report.html",), "md": ("report.md",), "json": (EDITS, RESULTS)}
    everything = [name for name in FILES if not is_foreign_card(Path(folder) / name)]
    wanted = files.get(format, everything)
    write_results(found, folder, wanted)
    return Rendered(found, tuple(Path(folder) / name for name in wanted))
