# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A trained editor out of its checkpoint, by the name of its method."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lightning_edit import MEND
from tests.contract.enumeration import trained_editor

ROOT = Path(__file__).parents[3]

SCRIPT = """
import sys
from lightning_edit import TrainedEditor
from lightning_edit.demos import tiny_requests, trained_tiny_model
editor = TrainedEditor.from_model(*trained_tiny_model(), checkpoint=sys.argv[1])
print(type(editor.trained).__name__, len(editor.edit(tiny_requests(1))))
"""


def test_the_method_of_a_checkpoint_need_not_be_imported_before() -> None:
    words = [sys.executable, "-c", SCRIPT, trained_editor("trained", MEND)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["MEND", "9"], done.stderr
