# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The verbs of the command line, in one table."""

# Imports nothing that the usage would have to wait for.

from __future__ import annotations

from typing import NamedTuple

__all__ = ["VERBS", "Verb"]


class Verb(NamedTuple):
    """A verb of the command ``lightning-edit``.

    Args:
        summary: What it does, in a line.
        function: Name of the function in ``lightning_edit.artifacts`` that does it; none for the
            verbs of Lightning's Trainer.
    """

    summary: str
    function: str = ""


#: All verbs by name, in the order in which the usage tells them.
VERBS: dict[str, Verb] = {
    "fit": Verb("make edits and keep them: one optimizer step a batch of requests"),
    "validate": Verb("measure a model as it stands"),
    "test": Verb("make edits, measure, and take them out again"),
    "predict": Verb("write texts before and after edits"),
    "apply": Verb("write a saved edit into its base model", "apply"),
    "revert": Verb("take an edit out of an edited model, bit for bit", "revert"),
    "diff": Verb("compare edits or models, by parameters and entries of memories", "diff"),
    "export": Verb("turn an edit into a LoRA adapter or a whole model", "export"),
    "serve-patch": Verb("put edits on a running server, and take them back", "serve_patch"),
    "report": Verb("write a run's report again", "report"),
    "list": Verb(
        "what there is: methods, data sets, configurations, or the edits in a folder", "list_"
    ),
}
