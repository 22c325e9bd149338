# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Watches an editor and hands every edit that it commits to a ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_edit.core.edit import Edit
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.processes import Processes
from lightning_edit.core.provenance import BaseModelInfo
from lightning_edit.core.request import EditRequest
from lightning_edit.ledger.entries import Draft, Entry
from lightning_edit.ledger.fingerprints import fingerprint
from lightning_edit.optim import E

if TYPE_CHECKING:
    from lightning_edit.ledger.ledger import Ledger
    from lightning_edit.modules.base import EditModule

__all__ = ["Recorder"]

_FIGURES = ("loss", "p_target", "took")
_PROPOSED = "It was taken back until it is approved (`lightning-edit ledger approve`)."


@dataclass(frozen=True)
class _Before(Generic[E]):
    """A model before an edit."""

    weights: str
    fingerprint: str
    parameters: Mapping[str, Tensor]
    standing: E


@dataclass(frozen=True)
class _Committed(Generic[E]):
    """An edit that was committed, with all that an exact undo takes."""

    edit: E
    sealed: E
    base: BaseModelInfo
    before: str
    after: str
    measured: Mapping[str, RequestFigures]
    #: What was measured with a proposed edit, before it was taken back; None of what is kept.
    proposed: Mapping[str, RequestFigures] | None


class Recorder(Generic[E]):
    """Hands every edit that an editor commits to a ledger.

    Where processes share the work, each of them has one, and the first writes.

    Args:
        ledger: The ledger; None in all processes but the first.
        editor: The editor, once its model is there.
        who: Who asks for the edits.
        why: Why.
        at_once: Write each row when its edit is committed; else when ``flush`` is called.
        measure: Measure each request before its edit, too.
        propose: Take each edit back once it is saved, and record it as proposed.
    """

    def __init__(
        self,
        ledger: Ledger | None,
        editor: EditModule[E],
        *,
        who: str = "",
        why: str = "",
        at_once: bool = True,
        measure: bool = False,
        propose: bool = False,
    ) -> None:
        self.ledger = ledger
        self.editor = editor
        self.who = who
        self.why = why
        self.at_once = at_once
        self.measure = measure
        self.propose = propose
        #: The rows that were written, those that the ledger had already included.
        self.entries: list[Entry] = []
        self._before: _Before[E] | None = None
        self._waiting: list[_Committed[E]] = []
        self._measured: dict[str, RequestFigures] = {}
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Begins to watch, if it does not already."""
        if self._handles:
            return
        optimizer = self.editor.edit_optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._look),
            optimizer.register_step_post_hook(self._take),
        ]

    def stop(self) -> None:
        """Writes what is not written yet, and watches no longer."""
        self.flush()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def flush(self) -> None:
        """Writes the rows of the edits that were committed since the last time."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        now = waiting[-1].after if self.at_once else self._now(keep=False).fingerprint
        for one in waiting:
            # Something else may have taken the edit back meanwhile, such as a callback that guards.
            is_gone = one.proposed is None and (
                "taken_back" in one.edit.details or now == one.before != one.after
            )
            self._write(one, is_gone=is_gone)

    def remove(self, undoes: Mapping[int, Sequence[EditRequest]], why: str) -> Entry | None:
        """Takes requests out of the editor's model, and records that.

        Args:
            undoes: Number of each row that they are taken back of, with these requests.
            why: Why.
        """
        self.flush()
        before = self._now()
        requests = tuple(request for some in undoes.values() for request in some)
        edit = self.editor.remove([request.id for request in requests])
        base = replace(self.editor.base, sha256=before.weights)
        provenance = self.editor.provenance
        draft = Draft(
            "undo",
            requests,
            provenance.method,
            provenance.settings,
            base,
            before.fingerprint,
            self._now(keep=False).fingerprint,
            tuple(undoes),
            self.who,
            why or self.why,
        )
        return self._append(draft, edit)

    def _look(self, optimizer: Optimizer, *_: object) -> None:
        self._before = self._now()
        staged = self.editor.edit_optimizer.staged
        if self.measure and staged is not None:
            self._measured = self.editor.session.measured(_requests(staged))

    def _now(self, *, keep: bool = True) -> _Before[E]:
        """The model as it stands, gathered by all processes."""
        editor = self.editor
        weights = editor.session.state.sha256
        kept = {n: p.detach().clone() for n, p in editor.target.parameters.items()} if keep else {}
        return _Before(weights, fingerprint(editor.model, weights), kept, editor.delta)

    def _take(self, optimizer: Optimizer, *_: object) -> None:
        edit, before, self._before = self.editor.edit_optimizer.written, self._before, None
        if edit is None or before is None:
            return
        if not (edit.changes_weights or edit.batches or edit.provenance.method):
            return  # a memory forgets something, and whoever has it do so writes the row
        # An edit of a memory knows what it replaces by itself.
        sealed = edit.seal(self.editor.model, before.parameters) if edit.changes_weights else edit
        base = replace(self.editor.base, sha256=before.weights)
        after = self._now(keep=False).fingerprint
        measured, self._measured = self._measured, {}
        proposed = None
        # What something else has taken back already, such as a guard, is not proposed.
        if self.propose and "taken_back" not in edit.details:
            try:
                proposed = self.editor.session.measured(edit.answered)
            finally:
                self.editor.edit_optimizer.rewind(before.standing)
            edit.mark_taken_back(_PROPOSED)
        self._waiting.append(
            _Committed(edit, sealed, base, before.fingerprint, after, measured, proposed)
        )
        if self.at_once:
            self.flush()

    def _write(self, one: _Committed[E], *, is_gone: bool) -> None:
        edit, editor = one.edit, self.editor
        failed = edit.details.get("failed", {})
        taken_back = edit.details.get("taken_back")
        failed = {id_: why for id_, why in failed.items() if why != taken_back}
        known = _requests(edit)
        after = one.proposed
        if after is None:
            after = {row["id"]: row for row in edit.details.get("requests", [])}
        about = edit.provenance if edit.provenance.method else editor.provenance
        answered = tuple(request for request in known if request.id not in failed)
        draft = Draft(
            "proposed" if one.proposed is not None else "rollback" if is_gone else "edit",
            answered,
            about.method,
            about.settings,
            one.base,
            one.before,
            one.before if is_gone else one.after,
            (),
            self.who,
            taken_back if is_gone and taken_back else self.why,
            _scores(answered, one.measured, after),
        )
        if len(edit) or answered:
            one.sealed.provenance = replace(about, base=one.base).answering(
                edit.provenance.request_ids, {request.id: request for request in answered}
            )
            self._append(draft, one.sealed if len(edit) and not is_gone else None)
        for request in known:
            if request.id in failed:
                now = draft.after if one.proposed is None else one.before
                refusal = replace(draft, kind="refused", requests=(request,), before=now, after=now)
                self._append(replace(refusal, why=failed[request.id], scores={}))

    def _append(self, draft: Draft, edit: E | None = None) -> Entry | None:
        """Adds a row, which the first process writes."""
        entry = None if self.ledger is None else self.ledger.append(draft, edit)
        if entry is not None:
            self.entries.append(entry)
        Processes.running().agree(True)  # nobody goes on, or saves, before it is on the disk
        return entry


def _requests(edit: Edit) -> list[EditRequest]:
    """What was asked for when an edit was made; what it answers, where that is not known."""
    known = [request for batch in edit.batches if batch for request in batch.requests]
    return known or list(edit.provenance.requests)


def _scores(
    requests: Sequence[EditRequest],
    before: Mapping[str, RequestFigures],
    after: Mapping[str, RequestFigures],
) -> dict[str, object]:
    """What was measured of requests, side by side; nothing of what was not."""
    scores: dict[str, object] = {}
    for name, rows in (("before", before), ("after", after)):
        found = {
            request.id: {key: value for key, value in row.items() if key in _FIGURES}
            for request in requests
            if (row := rows.get(request.id)) is not None
        }
        if any(found.values()):
            scores[name] = found
    return scores
