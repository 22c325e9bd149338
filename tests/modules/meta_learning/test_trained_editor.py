# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A trained editor out of its checkpoint, by the name of its method."""

from __future__ import annotations

from pathlib import Path

from lightning_edit import MEND
from tests.contract.enumeration import trained_editor
from tests.processes import run_module

SCRIPT = """
import sys
assert "lightning_edit" not in sys.modules
from lightning_edit import TrainedEditor
from lightning_edit.demos import tiny_requests, trained_tiny_model
editor = TrainedEditor.from_model(*trained_tiny_model(), checkpoint=sys.argv[1])
print(type(editor.trained).__name__, len(editor.edit(tiny_requests(1))))
"""


def test_the_method_of_a_checkpoint_need_not_be_imported_before(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = run_module(tmp_path, "script", trained_editor("trained", MEND))
    assert done.stdout.split() == ["MEND", "9"], done.stderr
