# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Writes proposed edits into a model, once somebody has approved them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import LedgerError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.wrappers import plain_parameters, unwrapped
from lightning_edit.ledger.entries import Draft, Entry
from lightning_edit.ledger.fingerprints import fingerprint
from lightning_edit.ledger.history import History, Lineage
from lightning_edit.ledger.undo import originals_of, summed
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.targets import restore

if TYPE_CHECKING:
    from lightning_edit.ledger.ledger import Ledger

__all__ = ["approve"]


def approve(ledger: Ledger, model: nn.Module, number: int, *, who: str, why: str) -> Entry:
    """Writes a proposed edit into a model, and records it; see ``Ledger.approve``."""
    entry = ledger.entry(number)
    if entry.kind != "proposed":
        raise LedgerError(
            f"Row {number} ({entry.kind}) is no proposal. A run with "
            "`EditLedger(propose=True)` makes them."
        )
    if isinstance(model, EditModule):
        raise LedgerError(
            "An editor does not go on from an edit that it did not make. Give its model; "
            "`ledger.editor(model, tokenizer)` makes an editor that does."
        )
    model = unwrapped(model)
    now = fingerprint(model)
    lineage = History(ledger.entries()).at(now)
    for one in lineage.standing:
        if one.entry.delta == entry.delta:
            raise LedgerError(f"Row {number} is in this model already, by row {one.entry.id}.")
    if entry.before != now and entry.before not in {row.before for row in lineage.path}:
        raise LedgerError(
            f"Row {number} was proposed for a model with the fingerprint {entry.before[:12]}…, and "
            f"this one has {now[:12]}…, which `{ledger.path}` does not know to stem from it. Give "
            "that model, or propose the edit again for this one."
        )
    edit = ledger.deltas.load(entry.delta)
    base = replace(entry.base, sha256=weight_hash(model))
    if isinstance(edit, WeightDelta) and entry.before != now:
        edit = _added(ledger, lineage, edit, model)
    else:
        edit.apply_(model, check=False)  # by the fingerprint it is the base
    try:
        draft = Draft(
            "edit",
            entry.requests,
            entry.method,
            entry.settings,
            base,
            now,
            fingerprint(model),
            (),
            who,
            why or f"approval of row {number}",
            entry.scores,
        )
        return ledger.append(draft, edit)
    except BaseException:  # what is not recorded is not kept
        edit.revert_(model)
        raise


def _added(ledger: Ledger, lineage: Lineage, edit: WeightDelta, model: nn.Module) -> WeightDelta:
    """Sets the weights to original + the changes of all edits and this one, rounded once."""
    named = plain_parameters(model)
    kept = {name: named[name].detach().clone() for name in edit.changes}
    roots = {**kept, **originals_of(ledger, lineage)}
    there = [ledger.deltas.load(one.entry.delta) for one in lineage.standing if one.entry.delta]
    total = summed([*(one for one in there if isinstance(one, WeightDelta)), edit], model)
    total.changes = {name: change for name, change in total.changes.items() if name in kept}
    try:
        total.reset_(model, {name: roots[name] for name in kept})
        moved = WeightDelta.from_state(edit.state_dict(), model)
        return WeightDelta(moved.changes, edit.provenance).seal(model, kept)
    except BaseException:
        restore({name: named[name] for name in kept}, kept)
        raise
