# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The verbs of the command line, in one table."""

# Imports nothing that the usage would have to wait for.

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["VERBS", "Verb"]


class Verb(NamedTuple):
    """A verb of the command ``lightning-edit``.

    Args:
        summary: What it does, in a line.
        function: Name of the function in ``lightning_edit.artifacts`` that does it, of a verb on
            saved edits.
        own: The file in ``lightning_edit.cli`` of a verb that has one for itself.
        verbs: Its own verbs, whose functions are in ``lightning_edit.ledger.verbs``.
    """

    summary: str
    function: str = ""
    own: str = ""
    verbs: Mapping[str, Verb] = MappingProxyType({})

    @property
    def module(self) -> str:
        """The file in ``lightning_edit.cli`` that runs it."""
        return self.own or ("console" if self.function or self.verbs else "trainer")


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
    "survive": Verb("which edits hold once the edited model is quantised", "survive"),
    "serve-patch": Verb("put edits on a running server, and take them back", "serve_patch"),
    "report": Verb("write a run's report again", "report"),
    "plan": Verb("what edits will take: memory, seconds, bytes sent, and what fits", "plan"),
    "list": Verb(
        "what there is: methods, data sets, configurations, or the edits in a folder", "list_"
    ),
    "compare": Verb(
        "methods on data sets by protocols, as tables; goes on where it was stopped",
        own="comparison",
    ),
    "tune": Verb(
        "settings of methods for a model, by rules and a search, as presets", own="tuning"
    ),
    "ledger": Verb(
        "the record of edits: list, show, verify, blame, undo, approve, export",
        verbs={
            "list": Verb("the rows, in order", "list_"),
            "show": Verb("all that is kept of a row", "show"),
            "verify": Verb("whether anything was changed since it was written", "verify"),
            "blame": Verb("which edits changed the answer to a prompt", "blame"),
            "undo": Verb("a model without some of its edits", "undo"),
            "approve": Verb("a model with an edit that was proposed", "approve"),
            "export": Verb("the rows as JSON lines or CSV", "export"),
        },
    ),
}
