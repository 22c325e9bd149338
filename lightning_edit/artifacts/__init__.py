# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What can be done with saved edits, and what making them will take."""

# At once, not on first use: a verb and its file share a name, and the verb is to be found by it.
# The files import what needs torch when a verb runs.

from lightning_edit.artifacts.apply import apply
from lightning_edit.artifacts.catalog import list_
from lightning_edit.artifacts.diff import diff
from lightning_edit.artifacts.export import export
from lightning_edit.artifacts.plan import plan
from lightning_edit.artifacts.report import report
from lightning_edit.artifacts.revert import revert
from lightning_edit.artifacts.serve_patch import serve_patch
from lightning_edit.artifacts.survive import survive

__all__ = [
    "apply",
    "diff",
    "export",
    "list_",
    "plan",
    "report",
    "revert",
    "serve_patch",
    "survive",
]
