# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Takes edits out of a model by the rows of a ledger: the last bit for bit, others by replay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_edit.core.committed import RequestBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import ArtifactError, EditError, LedgerError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.memory import MemoryWrite, memory_of
from lightning_edit.core.provenance import Provenance
from lightning_edit.core.wrappers import plain_parameters, unwrapped
from lightning_edit.ledger.entries import Draft, Entry
from lightning_edit.ledger.fingerprints import fingerprint
from lightning_edit.ledger.history import History, Lineage, Standing
from lightning_edit.ledger.outcomes import How, UndoPlan
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.targets import kept_weights, restore

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from lightning_edit.ledger.ledger import Ledger

__all__ = ["Undo", "forget", "held", "resumed_editor"]


class Undo:
    """Takes edits out of one model.

    Args:
        ledger: What is known of them.
        target: The model, or the editor that committed them.

    Raises:
        LedgerError: If the ledger knows no edit in the model.
    """

    def __init__(self, ledger: Ledger, target: nn.Module) -> None:
        self.ledger = ledger
        self.editor: EditModule[Edit] | None = target if isinstance(target, EditModule) else None
        self.model = held(target)
        self.history = History(ledger.entries())
        self.state = fingerprint(self.model)
        if not self.lineage.standing:
            raise LedgerError(
                f"`{ledger.path}` knows no edit in this model, whose fingerprint is "
                f"{self.state[:12]}…: it has none, or something else was changed in it since."
            )

    @property
    def lineage(self) -> Lineage:
        """How the model came to be what it is."""
        return self.history.at(self.state)

    def plans(
        self, number: int | None = None, *, to: int | None = None, everything: bool = False
    ) -> list[UndoPlan]:
        """What it costs; of several, each as if those after it were gone already."""
        plans, lineage = [], self.lineage
        for one in self._chosen(number, to, everything):
            plans.append(self._plan(one, lineage))
            path = lineage.path
            is_last = path[-1].id == one.entry.id
            left = tuple(other for other in lineage.standing if other is not one)
            lineage = Lineage(path[:-1] if is_last else path, left)
        return plans

    def run(
        self,
        number: int | None = None,
        *,
        to: int | None = None,
        everything: bool = False,
        who: str = "",
        why: str = "",
    ) -> list[Entry]:
        """Takes them out, and returns the rows that say so."""
        chosen = self._chosen(number, to, everything)
        rows = []
        for number_ in [one.entry.id for one in chosen]:
            lineage = self.lineage
            one = next(one for one in lineage.standing if one.entry.id == number_)
            plan = self._plan(one, lineage)
            rank_zero_info(f"Undo: {plan}.")
            base = replace(one.entry.base, sha256=weight_hash(self.model))
            with self._unless_it_fails(one):
                edit = self._take_out(one, lineage, plan.how)
                after = fingerprint(self.model)
                draft = Draft(
                    "undo",
                    one.requests,
                    one.entry.method,
                    one.entry.settings,
                    base,
                    self.state,
                    after,
                    (one.entry.id,),
                    who,
                    why,
                )
                rows.append(self.ledger.append(draft, edit))
            self.history.add(rows[-1])
            self.state = after
        return rows

    def _chosen(self, number: int | None, to: int | None, everything: bool) -> list[Standing]:
        """The edits to take out, the last one first."""
        standing = self.lineage.standing
        if sum((number is not None, to is not None, everything)) > 1:
            raise LedgerError("Name one edit, or one that is the last to stay, or take out all.")
        if everything:
            return list(reversed(standing))
        by_number = {one.entry.id: one for one in standing}
        wanted = number if number is not None else to
        if wanted is not None and wanted not in by_number:
            names = ", ".join(map(str, list(by_number)[:10])) + (
                ", …" if len(by_number) > 10 else ""
            )
            kind = self.ledger.entry(wanted).kind
            by = [str(one.id) for one in self.ledger.entries() if wanted in one.undoes]
            taken = f" Row {by[-1]} took it out." if by else ""
            raise LedgerError(
                f"Row {wanted} ({kind}) is no edit that is in this model.{taken} In it: {names}."
            )
        if to is not None:
            return [one for one in reversed(standing) if one.entry.id > to]
        return [by_number[wanted] if wanted is not None else standing[-1]]

    def _plan(self, one: Standing, lineage: Lineage) -> UndoPlan:
        ids = tuple(request.id for request in one.requests)
        if not one.entry.delta:
            return UndoPlan(one.entry.id, ids, "reverted", 0, 0, 0)
        delta = self.ledger.deltas.load(one.entry.delta)
        how, again = self._way(one, lineage, delta)
        written, originals = delta, delta.originals if isinstance(delta, WeightDelta) else {}
        if how == "made again" and self.editor is not None:
            written, originals = self.editor.delta, self.editor.target.originals
        nbytes = sum(tensor.nbytes for tensor in originals.values())
        return UndoPlan(
            one.entry.id,
            ids,
            how,
            again,
            len(originals) or len(written),
            nbytes or written.nbytes,
        )

    def _way(self, one: Standing, lineage: Lineage, delta: Edit) -> tuple[How, int]:
        """How an edit is taken out, and how many others are made again for it."""
        last = lineage.path[-1]
        is_whole = one.requests == one.entry.requests
        if last.id == one.entry.id and is_whole and self._knows_the_rest(lineage, delta):
            return "reverted", 0
        if self.editor is not None:
            left = self.editor.target.made_again([request.id for request in one.requests])
            return ("forgotten", 0) if left is None else ("made again", len(left))
        if isinstance(delta, MemoryWrite):
            return "forgotten", 0
        if not is_whole:
            raise LedgerError(
                f"Some requests of row {one.entry.id} are gone already, and the others were edited "
                "together with them. Give the editor that committed them, or one that goes on from "
                "them (`ledger.editor(model, tokenizer)`)."
            )
        return "added up", 0

    def _knows_the_rest(self, lineage: Lineage, delta: Edit) -> bool:
        """Whether what is left is known without making it again."""
        if not isinstance(delta, WeightDelta):
            return True
        if self.editor is None:
            return delta.keeps_originals
        # What a method carries from edit to edit is kept with the last of them alone.
        total = self.editor.delta
        ids = tuple(request.id for one in lineage.standing for request in one.requests)
        is_whole = len(total.parts) == len(lineage.standing)
        return is_whole and not total.carried and total.provenance.request_ids == ids

    @contextmanager
    def _unless_it_fails(self, one: Standing) -> Iterator[None]:
        """Context manager: model and editor as they were, if the row cannot be written, say."""
        if not one.entry.delta:
            yield
            return
        if self.editor is None:
            with self.ledger.deltas.load(one.entry.delta).kept(self.model, always=False):
                yield
            return
        optimizer, history = self.editor.edit_optimizer, self.editor.history
        before = optimizer.delta
        try:
            with before.kept(self.model, always=False):
                yield
        except BaseException:
            self.editor.history = history
            optimizer.take_over(before)
            raise

    def _take_out(self, one: Standing, lineage: Lineage, how: How) -> Edit | None:
        """Takes an edit out, and gives what has changed, unless that is its inverse."""
        if not one.entry.delta:
            return None
        delta = self.ledger.deltas.load(one.entry.delta)
        ids = [request.id for request in one.requests]
        if how == "reverted":
            self._revert(delta, lineage)
            return None
        if self.editor is not None:
            return self.editor.remove(ids)
        if isinstance(delta, MemoryWrite):
            return forget(self.model, delta, ids)
        return self._add_up(cast(WeightDelta, delta), one, lineage)

    def _revert(self, delta: Edit, lineage: Lineage) -> None:
        batches = () if self.editor is None else self.editor.delta.batches
        try:
            delta.revert_(self.model)
        except ArtifactError as error:
            raise LedgerError(str(error)) from error
        if self.editor is None:
            return
        gone = {request.id for request in lineage.standing[-1].requests}
        self.editor.history = [row for row in self.editor.history if row["id"] not in gone]
        optimizer = self.editor.edit_optimizer
        if isinstance(delta, WeightDelta):
            total: Edit = self._sum(lineage.standing[:-1])
            total.batches = batches[:-1]
        else:  # in which an earlier edit of the same request is back, if there was one
            total = optimizer.delta
            places = [i for i, batch in enumerate(batches) if batch and batch.ids & gone]
            total.batches = tuple(b for i, b in enumerate(batches) if i not in places[-1:])
        optimizer.take_over(total)

    def _sum(self, standing: Sequence[Standing]) -> WeightDelta:
        """The changes of weights of some edits, added up as an editor does."""
        return summed(self._changes(standing), self.model)

    def _changes(self, standing: Sequence[Standing]) -> list[WeightDelta]:
        found = [self.ledger.deltas.load(one.entry.delta) for one in standing if one.entry.delta]
        return [delta for delta in found if isinstance(delta, WeightDelta)]

    def _add_up(self, delta: WeightDelta, one: Standing, lineage: Lineage) -> Edit:
        """Sets the weights to original + the other changes, rounded once."""
        roots = {n: t for n, t in originals_of(self.ledger, lineage).items() if n in delta.changes}
        others = self._changes([other for other in lineage.standing if other is not one])
        left = summed(others, self.model)
        left.changes = {n: change for n, change in left.changes.items() if n in roots}
        parameters = {name: plain_parameters(self.model)[name] for name in roots}
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            left.reset_(self.model, roots)
        except BaseException:
            restore(parameters, kept)
            raise
        about = one.entry
        ids = tuple(request.id for request in one.requests)
        provenance = Provenance(about.method, "", dict(about.settings), about.base, ids)
        return WeightDelta((-delta).changes, provenance).seal(self.model, kept)


def held(target: nn.Module) -> nn.Module:
    """The language model that an editor holds, or the model itself, without what wraps it."""
    found: nn.Module = unwrapped(target.model if isinstance(target, EditModule) else target)
    return found


def originals_of(ledger: Ledger, lineage: Lineage) -> dict[str, Tensor]:
    """What stood in a model before all edits that a ledger knows in it, by the parameter's name.

    Raises:
        LedgerError: If one of them was saved without what it replaced.
    """
    roots: dict[str, Tensor] = {}
    for entry in lineage.path:
        delta = ledger.deltas.load(entry.delta) if entry.delta else None
        if not isinstance(delta, WeightDelta):
            continue
        if not delta.keeps_originals:
            raise LedgerError(
                f"Row {entry.id} was saved without what its edit replaced, so that what "
                "stood there before is not known. Load the unedited model, and edit it with the "
                "requests that are to stay."
            )
        roots = {**delta.originals, **roots}
    return roots


def summed(deltas: Sequence[WeightDelta], model: nn.Module) -> WeightDelta:
    """The sum of changes, in order, on the device of a model's weights."""
    total = WeightDelta({})
    for delta in deltas:
        moved = WeightDelta.from_state(delta.state_dict(), model)
        moved.provenance = delta.provenance
        total = total + moved
    return total


def resumed_editor(
    ledger: Ledger,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, object],
) -> EditModule[Edit]:
    """An editor that goes on from the edits which a model holds; see ``Ledger.editor``."""
    import lightning_edit

    undo = Undo(ledger, model)
    lineage = undo.lineage
    about = {(one.entry.method, str(dict(one.entry.settings))) for one in lineage.standing}
    first = lineage.standing[0].entry
    name = first.method
    # Of the package's own editors, for a row is data and names no class to import.
    cls = getattr(lightning_edit, name) if name in lightning_edit.__all__ else None
    if len(about) > 1 or not (isinstance(cls, type) and issubclass(cls, EditModule)):
        names = ", ".join(sorted({method or "no editor" for method, _ in about}))
        raise LedgerError(
            f"The edits in this model are not of one editor with the same settings ({names}), so "
            "that none can make them again. Take out the last ones first (`to`)."
        )
    known = {k: v for k, v in first.settings.items() if k not in ("model", "cache_dir")}
    known |= settings
    inner = unwrapped(model)
    roots = originals_of(ledger, lineage)
    named = {name: plain_parameters(inner)[name] for name in roots}
    with kept_weights(named) if named else nullcontext():
        restore(named, roots)
        editor: EditModule[Edit] = cls.from_model(model, tokenizer, preset=None, **known)
    deltas = undo._changes(lineage.standing)
    optimizer = editor.edit_optimizer
    batches = tuple(RequestBatch(one.requests) for one in lineage.standing)
    total: Edit = summed(deltas, inner) if deltas else optimizer.delta
    total.check_targets(inner, optimizer.originals)
    total.batches = batches
    optimizer.take_over(total)
    editor.history = [{"id": request.id} for batch in batches for request in batch.requests]
    return editor


def forget(model: nn.Module, delta: MemoryWrite, ids: Sequence[str]) -> MemoryWrite:
    """Takes an edit out of the middle of a memory, and gives what has changed."""
    memory = memory_of(model)
    before = memory.entries
    try:
        delta.revert_(model)
    except ArtifactError:  # later edits have changed its entries
        try:
            MemoryWrite.removing(model, ids).apply_(model)
        except EditError as error:
            raise LedgerError(str(error)) from error
    return MemoryWrite.between(memory, memory.entries, before)
