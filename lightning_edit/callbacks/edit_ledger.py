# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Records every committed edit of a run in a ledger, and looks for conflicts with it before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_edit.callbacks.before_run import BeforeRun
from lightning_edit.callbacks.edit_evaluator import EditEvaluator
from lightning_edit.callbacks.model_access import find_model
from lightning_edit.callbacks.run_folder import is_dry, run_folder
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import LedgerError, ModelError, RequestError
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest
from lightning_edit.ledger.conflicts import Conflict, conflicts_among, conflicts_with
from lightning_edit.ledger.entries import Draft
from lightning_edit.ledger.fingerprints import fingerprint
from lightning_edit.ledger.history import Standing
from lightning_edit.ledger.ledger import Ledger
from lightning_edit.ledger.recorder import Recorder
from lightning_edit.modules.base import EditModule

__all__ = ["EditLedger"]

#: What is done about a request that meets another one of the same thing.
ConflictPolicy = Literal["error", "skip", "replace"]


class _Saved(TypedDict):
    """What a checkpoint keeps: the ledger, its last row, and the model before the run."""

    path: str
    rows: int
    head: str
    before: str


class EditLedger(Callback):
    """Records every edit that a run commits, before the checkpoint that holds it is written.

    So a run that is killed at any point and resumed has each edit in the ledger once: one that is
    made again is known by its requests and by the fingerprint of the model that it leads to. Of a
    module that is no editor, and of editors that Lightning's loop trains, the whole change is one
    row, which is written at the end.

    Before the first edit, requests are compared with each other and with the edits that the ledger
    knows in the model. A duplicate asks again for what is in the model, a contradiction for another
    answer to the same words about the same subject.

    Args:
        path: The database; ``ledger.db`` in the run's folder when None.
        who: Who asks for the edits.
        why: Why.
        on_conflict: ``error`` refuses the run before a weight is touched; ``skip`` leaves such
            requests out; ``replace`` takes the old edit out and makes the new one, and of two that
            are asked for together makes the last. What is left out has a row that says so.
        key: PEM file with an Ed25519 key by which rows are signed.
        originals: Keep what an edit replaces with it, which an exact undo takes.
        measure: Measure each request before its edit, too.
        propose: Take each edit back once it was measured and saved, and record it as ``proposed``
            for ``lightning-edit ledger approve`` to keep. What an
            [`EditGuard`][lightning_edit.EditGuard] of the same Trainer takes back is no proposal.
        model_attribute: Attribute of the LightningModule that holds the model; found by its type
            when None.

    Examples:
        >>> EditLedger("runs/ledger.db", why="ticket 7").on_conflict
        'error'
    """

    def __init__(
        self,
        path: str | None = None,
        who: str = "",
        why: str = "",
        on_conflict: ConflictPolicy = "error",
        key: str | None = None,
        originals: bool = True,
        measure: bool = True,
        propose: bool = False,
        model_attribute: str | None = None,
    ) -> None:
        if on_conflict not in ("error", "skip", "replace"):
            raise ValueError(
                f"`on_conflict` is {on_conflict!r}. Expected `error`, `skip` or `replace`."
            )
        self.path = path
        self.who = who
        self.why = why
        self.on_conflict = on_conflict
        self.key = key
        self.originals = originals
        self.measure = measure
        self.propose = propose
        self.model_attribute = model_attribute
        #: The ledger of the run; in the first process alone.
        self.ledger: Ledger | None = None
        self._recorder: Recorder[Edit] | None = None
        self._saved: _Saved | None = None
        self._is_written = False
        self._left_out: set[str] = set()
        self._compared: set[str] = set()
        self._before = ""
        self._whole = BeforeRun(type(self).__name__)

    # -- a run -------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the ledger, and looks for conflicts before anything is edited."""
        self._recorder, self._is_written = None, False
        self._left_out, self._compared = set(), set()
        default = run_folder(trainer, None) / "ledger.db"
        if is_dry(trainer):
            return
        saved, self._saved = self._saved, None
        path = self.path or (saved["path"] if saved is not None else str(default))
        if trainer.is_global_zero:
            self.ledger = Ledger(path, who=self.who, key=self.key, originals=self.originals)
            if saved is not None:
                _check_head(self.ledger, saved)
        requests: Sequence[EditRequest] = getattr(
            getattr(trainer, "datamodule", None), "requests", ()
        )
        if isinstance(pl_module, EditModule) and not pl_module.automatic_optimization:
            editor = cast("EditModule[Edit]", pl_module)
            self._recorder = Recorder(
                self.ledger,
                editor,
                who=self.who,
                why=self.why,
                at_once=False,
                measure=self.measure,
                propose=self.propose,
            )
            self._compare(editor.session.unanswered(requests))
            return
        if self.propose:
            raise LedgerError(
                f"What {type(pl_module).__name__} learns cannot be proposed: its steps are no "
                "edits, which are there one by one. Take an editor that commits edits, such as "
                "ROME or GRACE, or leave `propose` out."
            )
        self._begin_whole(pl_module, saved["before"] if saved is not None else "")
        if self._before:
            self._compare(requests)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Begins to watch, and leaves out of a batch what is not to be edited."""
        if self._recorder is None:
            return
        self._recorder.start()  # after whoever else watches, such as a guard, which decides first
        if not isinstance(batch, list):
            return
        new = [r for r in batch if isinstance(r, EditRequest) and r.id not in self._compared]
        self._compare(self._recorder.editor.session.unanswered(new))
        batch[:] = [r for r in batch if getattr(r, "id", None) not in self._left_out]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object, **kwargs: object
    ) -> None:
        """Writes the row of the edit, before any checkpoint holds it."""
        if self._recorder is not None:
            self._recorder.flush()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what is not written yet."""
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None
        elif self._before and not self._is_written:
            self._is_written = True
            self._write_whole(trainer, pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Writes the row of an edit that is in the model already."""
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None

    def take_out(self, editor: EditModule[Edit], request_ids: Sequence[str], why: str) -> None:
        """Takes requests of the run out of its model, as another callback asks, and records that.

        Args:
            editor: The editor of the run.
            request_ids: Ids of the requests.
            why: Why.
        """
        if self._recorder is None:
            editor.remove(request_ids)
            return
        self._recorder.flush()
        gone = set(request_ids)
        _, standing = self._standing()
        asked = {one.entry.id: [r for r in one.requests if r.id in gone] for one in standing}
        self._recorder.remove({row: some for row, some in asked.items() if some}, why)

    # -- checkpoints -------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, object]:
        if self.ledger is None:
            return {}
        saved: _Saved = {
            "path": str(self.ledger.path.resolve()),
            "rows": len(self.ledger),
            "head": self.ledger.head,
            "before": self._before,
        }
        return dict(saved)

    @override
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._saved = cast(_Saved, state_dict) if state_dict else None

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]
    ) -> None:
        self._whole.save(lambda: find_model(pl_module, self.model_attribute), checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]
    ) -> None:
        self._whole.load(checkpoint)

    # -- the whole change of a fit -----------------------------------------------------------

    def _begin_whole(self, pl_module: LightningModule, before: str) -> None:
        """Keeps the model as it is before a fit whose change is one row."""
        self._before = before
        if isinstance(pl_module, EditModule):
            self._before = before or fingerprint(pl_module.model, pl_module.base.sha256)
            return
        try:
            model = find_model(pl_module, self.model_attribute)
            is_resumed = self._whole.is_loaded
            self._whole.begin(model)
            self._before = before if is_resumed else fingerprint(model)
        except ModelError as error:
            self._before = ""
            rank_zero_warn(f"Nothing is recorded of this run. {error}")

    def _write_whole(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # By every process, since sharded weights are gathered by all of them together.
        evaluators = [c for c in trainer.callbacks if isinstance(c, EditEvaluator)]  # type: ignore[attr-defined]
        for evaluator in evaluators:
            evaluator.finish(pl_module)
        datamodule = getattr(trainer, "datamodule", None)
        requests = tuple(getattr(datamodule, "requests", ()))
        model: nn.Module
        if isinstance(pl_module, EditModule):
            model, edit = pl_module.model, pl_module.committed()
            about = pl_module.provenance
            method, settings, base = about.method, about.settings, about.base
        elif self._whole.weights is not None:
            model, whole = find_model(pl_module, self.model_attribute), self._whole.weights
            edit, base = whole.edit(model), whole.info(model)
            method = type(pl_module).__name__
            settings = {"epochs": trainer.current_epoch, "steps": trainer.global_step}
        else:
            return
        after = fingerprint(model)
        if self.ledger is None or not len(edit):
            return
        draft = Draft(
            "edit",
            tuple(r for r in requests if isinstance(r, EditRequest)),
            method,
            settings,
            base,
            self._before,
            after,
            (),
            self.who,
            self.why,
            _scores(evaluators),
        )
        self.ledger.append(draft, edit)

    # -- conflicts ---------------------------------------------------------------------------

    def _compare(self, requests: Sequence[EditRequest]) -> None:
        """Looks for conflicts of requests that were not looked at yet, and does what is told."""
        new = [request for request in requests if request.id not in self._compared]
        self._compared |= {request.id for request in new}
        if not new:
            return
        now, standing = self._standing()
        among, known = conflicts_among(new), conflicts_with(new, standing)
        found = [*among, *known]
        if not found:
            return
        if self.on_conflict == "error" or self._recorder is None:
            raise RequestError(_told(found))
        for conflict in found:
            rank_zero_info("%s", conflict)
        if self.on_conflict == "skip":
            self._leave_out([(c.request, c) for c in found], now)
            return
        # The last of what is asked for together counts, and what is in the model already stays.
        self._leave_out([(c.other, c) for c in among], now)
        known = [c for c in known if c.request.id not in self._left_out]
        _check_removable(known, self._recorder.editor)
        self._leave_out([(c.request, c) for c in known if not c.is_contradiction], now)
        for conflict in known:
            if conflict.is_contradiction and conflict.entry is not None:
                why = f"replaced by request {conflict.request.id!r}"
                self._recorder.remove({conflict.entry: [conflict.other]}, why)

    def _standing(self) -> tuple[str, tuple[Standing, ...]]:
        """The model's fingerprint, and the edits in it, as the first process reads them.

        Where the whole fit is one edit, those that were there before it: a run that goes on after
        its row was written does not contradict itself.
        """
        now = self._before
        if self._recorder is not None:
            editor = self._recorder.editor
            now = fingerprint(editor.model, editor.session.state.sha256)
        own = () if self.ledger is None else self.ledger.standing_at(now)
        return now, Processes.running().objects(own)[0]

    def _leave_out(self, pairs: Sequence[tuple[EditRequest, Conflict]], now: str) -> None:
        """Has requests not be edited, and records why."""
        for request, conflict in pairs:
            if request.id in self._left_out:
                continue
            self._left_out.add(request.id)
            draft = Draft("refused", (request,), before=now, after=now, why=str(conflict))
            if self.ledger is not None:
                self.ledger.append(draft)


def _check_removable(conflicts: Sequence[Conflict], editor: EditModule[Edit]) -> None:
    """Checks that an editor can take out what contradicts, before it takes out any of it."""
    there = set(editor.target.request_ids)
    for conflict in conflicts:
        if conflict.is_contradiction and conflict.other.id not in there:
            raise RequestError(
                f"{conflict} This editor did not commit that one, and so cannot take it out. Go on "
                "with one that did, such as `ledger.editor(model, tokenizer)` gives, or take it "
                "out first (`ledger.undo`). Nothing was edited."
            )


def _told(conflicts: Sequence[Conflict]) -> str:
    more = f" {len(conflicts) - 5} more are like it." if len(conflicts) > 5 else ""
    return (
        " ".join(map(str, conflicts[:5]))
        + more
        + " Nothing was edited. Leave one of them out, or have an editor decide: "
        "`EditLedger(on_conflict='skip')` leaves the new ones out, `'replace'` takes the old ones "
        "out of the model."
    )


def _check_head(ledger: Ledger, saved: _Saved) -> None:
    """Checks that a ledger has the rows that a checkpoint knows."""
    if saved["rows"] and (
        len(ledger) < saved["rows"] or ledger.entry(saved["rows"]).hash != saved["head"]
    ):
        raise LedgerError(
            f"The checkpoint knows {saved['rows']} rows of a ledger, the last with the hash "
            f"{saved['head'][:12]}…, but `{ledger.path}` has no such row: it is another ledger, or "
            "was changed. Give the one of the run (`path`), or resume without this callback."
        )


def _scores(evaluators: Sequence[EditEvaluator]) -> dict[str, object]:
    """What was measured of a run, by metric and reading."""
    scores: dict[str, object] = {}
    for evaluator in evaluators:
        for name, row in evaluator.rows.items():
            scores[name] = {"before": row.before, "after": row.after}
    return scores
