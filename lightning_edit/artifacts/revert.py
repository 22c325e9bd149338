# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A saved edit taken out of an edited model."""

# torch is imported when the function runs, so that help on the command line does not wait for it.

from __future__ import annotations

from lightning_edit.artifacts.outcomes import Written

__all__ = ["revert"]


def revert(
    delta: str,
    model: str = "edited",
    output: str = "restored",
    check: bool = True,
    force: bool = False,
) -> Written:
    """Writes a copy of an edited model without the edit: the original, bit for bit.

    Of a model with a memory the entries of the edit are taken out, and what it replaced comes back;
    what other edits have put there stays.

    Args:
        delta: Folder of the saved edit, or of the run that saved it.
        model: Folder of the edited model.
        output: Folder to write.
        check: Compare the hash of the result with that of the edit's base. Turn this off to take
            out one edit of several that a model has.
        force: Replace a model that lies in the output folder.

    Returns:
        What was written.

    Raises:
        ArtifactError: If the edit was saved without originals or is not in the model, if the
            result is not the base, or the output folder must not be replaced.
        ModelError: If the model cannot be loaded.
    """
    from lightning_edit.artifacts.cards import model_card
    from lightning_edit.artifacts.folders import check_output, held_memory, save_model
    from lightning_edit.artifacts.sources import facts_of, open_edit
    from lightning_edit.core.errors import ArtifactError
    from lightning_edit.core.hashing import weight_hash
    from lightning_edit.models import load_model

    artifact, edit = open_edit(delta)
    folder = check_output(output, force=force, inputs=(artifact, model))
    loaded = load_model(model, dtype="auto")
    edit.revert_(loaded)
    expected = edit.provenance.base.sha256
    found = weight_hash(loaded) if expected else ""
    if check and found != expected:
        raise ArtifactError(
            f"What the edit changed in `{model}` is as it was before, but the model has the "
            f"weight hash {found[:12]}…, and the edit's base {expected[:12]}…: another edit is "
            "in it too. Undo later edits first, or keep them with `check=False` (`--no_check`)."
        )
    memory = held_memory(loaded, model)
    card = "" if memory is None else model_card(memory, memory)
    has_tokenizer = save_model(loaded, folder, source=model, card=card, memory=memory)
    notes = [] if has_tokenizer else ["The edited model has no tokenizer that could be copied."]
    if expected and found == expected:
        what = "bit" if memory is None else "bit of the weights"
        notes.append(f"Every {what} is that of the base: its weight hash is {expected[:12]}….")
    elif expected:
        notes.append("Other changes are left in the model: it is not the edit's base.")
    else:
        notes.append("The edit does not record its base's hash, so the result was not checked.")
    if memory is not None:
        left = "1 entry" if len(memory) == 1 else f"{len(memory)} entries"
        notes.append(f"The memory still holds {left} of other edits.")
    facts = {"edited model": model, **facts_of(edit)}
    return Written(folder, "restored model", facts, tuple(notes))
