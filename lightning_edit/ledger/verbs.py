# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What can be done with a ledger without a Trainer: the verbs of ``lightning-edit ledger``."""

# torch is imported when a function runs, so that help on the command line does not wait for it.

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_edit.ledger.outcomes import Approved, Blamed, Exported, Listed, Undone, Verified

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_edit.core.edit import Edit
    from lightning_edit.ledger.ledger import Ledger

__all__ = ["approve", "blame", "export", "list_", "show", "undo", "verify"]


def list_(ledger: str) -> Listed:
    """Tells the rows of a ledger, in order.

    Args:
        ledger: The database.

    Raises:
        LedgerError: If it is no ledger, or damaged.
    """
    return Listed(_open(ledger).entries())


def show(ledger: str, entry: int) -> Listed:
    """Tells all that a ledger keeps of a row.

    Args:
        ledger: The database.
        entry: Number of the row.

    Raises:
        LedgerError: If there is no such row.
    """
    return Listed([_open(ledger).entry(entry)], in_full=True)


def verify(ledger: str, key: str | None = None, head: str = "") -> Verified:
    """Checks that nothing in a ledger was changed: rows, their number, saved edits, signatures.

    Args:
        ledger: The database.
        key: The public key by which every row must be signed: in hexadecimal, or a PEM file. By
            default, signatures are compared with the key that each row names.
        head: Hash of a row that was the last one at some time, which must be there still.

    Returns:
        What was looked at, where all is well.

    Raises:
        LedgerError: If something is not as it was written, with all that is wrong.
    """
    from lightning_edit.core.errors import LedgerError

    opened = _open(ledger)
    if problems := opened.verify(key=key, head=head):
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise LedgerError(f"`{ledger}` is not as it was written:{lines}")
    entries = opened.entries()
    return Verified(
        len(entries),
        len({entry.delta for entry in entries} - {""}),
        sum(bool(entry.public_key) for entry in entries),
        opened.head,
    )


def blame(
    ledger: str, prompt: str, model: str = "edited", answer: str = "", threshold: float = 0.05
) -> Blamed:
    """Tells which edits changed the answer to a prompt, by taking each out by itself.

    Args:
        ledger: The database.
        prompt: What to ask.
        model: Folder of the edited model.
        answer: The answer whose probability is measured. By default what the model says.
        threshold: Change of the probability from which on an edit is named as a cause.

    Raises:
        LedgerError: If the ledger knows no edit in the model.
        ModelError: If the model cannot be loaded.
    """
    from lightning_edit.models import load_model, load_tokenizer

    opened = _open(ledger)
    loaded = load_model(model, dtype="auto")
    return opened.blame(loaded, prompt, load_tokenizer(model), answer=answer, threshold=threshold)


def undo(
    ledger: str,
    entry: int | None = None,
    model: str = "edited",
    output: str = "restored",
    to: int | None = None,
    all: bool = False,
    again: bool = False,
    dry_run: bool = False,
    who: str = "",
    why: str = "",
    key: str | None = None,
    force: bool = False,
) -> Undone:
    """Writes a copy of a model without some of its edits, and records that they were taken out.

    Args:
        ledger: The database.
        entry: Row of the edit. By default the last one that is in the model.
        model: Folder of the edited model.
        output: Folder to write.
        to: Row of an edit after which all are taken out.
        all: Take out all that the ledger knows in the model.
        again: Make the edits that stay again with their editor, as if the others had never been,
            where one in the middle is taken out. By default the weights become original + the other
            changes, rounded once.
        dry_run: Only tell what it costs.
        who: Who asked for it.
        why: Why.
        key: PEM file with the Ed25519 key by which the rows are signed.
        force: Replace a model that lies in the output folder.

    Raises:
        LedgerError: If the ledger knows no such edit in the model, or cannot take it out.
        ArtifactError: If the output folder must not be replaced.
        ModelError: If the model cannot be loaded.
    """
    from torch import nn

    from lightning_edit.artifacts.folders import check_output
    from lightning_edit.ledger.fingerprints import fingerprint
    from lightning_edit.models import load_model, load_tokenizer

    opened = _open(ledger, who, key)
    folder = check_output(output, force=force, inputs=(ledger, model))
    loaded = load_model(model, dtype="auto")
    target: nn.Module = loaded
    if again:
        target = opened.editor(loaded, load_tokenizer(model))
    plans = tuple(opened.plan(target, entry, to=to, everything=all))
    if dry_run:
        return Undone(plans, fingerprint=fingerprint(loaded))
    rows = opened.undo(target, entry, to=to, everything=all, why=why)
    _save(opened, loaded, model, folder)
    return Undone(plans, tuple(rows), folder, fingerprint(loaded))


def approve(
    ledger: str,
    entry: int,
    model: str | None = None,
    output: str = "edited",
    who: str = "",
    why: str = "",
    key: str | None = None,
    force: bool = False,
) -> Approved:
    """Writes a model with an edit that was proposed, and records that it is kept.

    Args:
        ledger: The database.
        entry: Row of the proposal.
        model: The model that it was proposed for: a folder, a hub id, a GGUF file or `smollm2`; or
            the folder of that model with later edits. By default the one that the row names.
        output: Folder to write.
        who: Who approves it.
        why: Why.
        key: PEM file with the Ed25519 key by which the row is signed.
        force: Replace a model that lies in the output folder.

    Raises:
        LedgerError: If the row is no proposal, or was made for another model.
        ArtifactError: If the output folder must not be replaced.
        ModelError: If the model cannot be loaded.
    """
    from lightning_edit.artifacts.folders import check_output
    from lightning_edit.artifacts.sources import base_name, load_base

    opened = _open(ledger, who, key)
    proposed = opened.edit(entry)
    source = base_name(proposed, opened.deltas.path(opened.entry(entry).delta), model)
    folder = check_output(output, force=force, inputs=(ledger, source))
    loaded = load_base(proposed, source, given=model is not None)
    row = opened.approve(loaded, entry, why=why)
    _save(opened, loaded, source, folder, proposed)
    return Approved(row, folder)


def export(ledger: str, output: str, force: bool = False) -> Exported:
    """Writes the rows of a ledger as JSON lines, or as CSV.

    Args:
        ledger: The database.
        output: A file that ends with `.jsonl` or `.csv`.
        force: Replace a file that is there.

    Raises:
        LedgerError: If the file is there, or its name ends otherwise.
    """
    return Exported(Path(output), _open(ledger).export(output, force=force))


def _save(
    ledger: Ledger,
    loaded: PreTrainedModel,
    source: str,
    folder: Path,
    edit: Edit | None = None,
) -> None:
    """Writes a model whose edits a ledger knows.

    Args:
        ledger: The ledger.
        loaded: The model.
        source: What it was loaded from.
        folder: Where to.
        edit: What was written into it since.
    """
    from lightning_edit.artifacts.cards import model_card
    from lightning_edit.artifacts.folders import held_memory, save_model
    from lightning_edit.artifacts.stacks import record_of

    memory = held_memory(loaded, source, edit)
    kept = [one.entry for one in ledger.standing(loaded) if one.entry.delta]
    edits = [edit for row in kept if (edit := ledger.edit(row.id)).changes_weights]
    last = memory or (edits[-1] if edits else None)
    earlier = [edit for edit in edits if edit is not last]
    paths = [ledger.deltas.path(row.delta) for row in kept if row.delta and memory is None]
    save_model(
        loaded,
        folder,
        source=source,
        card="" if last is None else model_card(last, memory, earlier),
        memory=memory,
        edits=record_of(paths, folder),
    )


def _open(path: str, who: str = "", key: str | None = None) -> Ledger:
    """A ledger that is there already."""
    from lightning_edit.core.errors import LedgerError
    from lightning_edit.ledger.ledger import Ledger

    if not Path(path).is_file():
        raise LedgerError(
            f"There is no ledger `{path}`. A run with the callback `EditLedger` writes one, by "
            "default `ledger.db` in its folder."
        )
    return Ledger(path, who=who, key=key)
