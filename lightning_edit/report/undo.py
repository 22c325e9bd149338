# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""How a saved edit is put in and taken out again, and what whoever uses it ought to know."""

from __future__ import annotations

import json
import shlex

from lightning_edit.report.results import RunReport

__all__ = ["CAUTION", "INTENDED_USE", "UNDO", "apply_commands", "apply_python"]

INTENDED_USE = (
    "Meant for correcting single facts of a language model, and for studying how such corrections "
    "spread. The edit changes what the model states, not what it can do; whatever was not probed "
    "here is not known to be unharmed."
)

CAUTION = (
    "An edited model states what it was told to state, true or not, and gives no sign of it. The "
    "same tools that mend an outdated fact can plant a false one. Check the requests behind an "
    "edit before using it, say that a model is edited wherever it is used or passed on, and do "
    "not rely on it where an error would do harm: answers further off than these probes may "
    "have changed, and the old answer may come back under other wordings."
)


UNDO = (
    "What it replaces is kept with it, so that undoing is exact, bit for bit: subtracting the "
    "change again would leave rounding errors behind."
)


def apply_commands(report: RunReport) -> str:
    """The commands that write an edited copy of the model and undo it, run in the report's folder.

    Examples:
        >>> print(apply_commands(RunReport(method="ROME")))
        lightning-edit apply delta --output edited
        lightning-edit revert delta --model edited --output restored
    """
    artifact = shlex.quote(report.artifact)
    return (
        f"lightning-edit apply {artifact} --output edited\n"
        f"lightning-edit revert {artifact} --model edited --output restored"
    )


def apply_python(report: RunReport) -> str:
    """Lines of Python that load, apply and undo the edit.

    Examples:
        >>> "delta.revert_(model)" in apply_python(RunReport(method="ROME"))
        True
    """
    cls = report.artifact_class
    return "\n".join(
        [
            f"from lightning_edit import {cls}",
            "",
            f"delta = {cls}.load({json.dumps(report.artifact)})",
            "delta.apply_(model)    # puts the edit into the model",
            "delta.revert_(model)   # takes it out again, bit for bit",
            "with delta.applied(model):",
            "    ...                # edited in here only",
        ]
    )
