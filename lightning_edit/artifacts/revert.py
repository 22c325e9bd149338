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
    others: list[str] | None = None,
    check: bool = True,
    force: bool = False,
) -> Written:
    """Writes a copy of an edited model without the edit: the original, bit for bit.

    An edit comes out of the middle of several, too, in any order. Where the others are known, the
    weights become original + the other changes, rounded once: with one other edit left, bit for bit
    what `apply` writes of it. Where they are not, and the check is off, the change is subtracted,
    which is exact up to rounding.

    Of a model with a memory the entries of the edit are taken out, and what it replaced comes back;
    what other edits have put there stays.

    Args:
        delta: Folder of the saved edit, or of the run that saved it.
        model: Folder of the edited model.
        output: Folder to write.
        others: Folders of the edits of weights that stay in the model. By default those that
            `apply` has listed in its folder, where they still lie in their places.
        check: Check that what is left is the edit's base, or that with the other edits. Turn this
            off to take out one edit of several that are not known.
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
    from lightning_edit.artifacts.stacks import Stack, applied_to, record_of
    from lightning_edit.core.delta import WeightDelta
    from lightning_edit.core.errors import ArtifactError
    from lightning_edit.core.hashing import weight_hash
    from lightning_edit.models import load_model

    artifact, edit = open_edit(delta)
    named = applied_to(model) if others is None else [open_edit(name)[0] for name in others]
    same = [i for i, path in enumerate(named) if path.resolve() == artifact.resolve()]
    # One that was applied twice is taken out once.
    staying = [path for i, path in enumerate(named) if i not in same[-1:]]
    folder = check_output(output, force=force, inputs=(artifact, model, *staying))
    loaded = load_model(model, dtype="auto")
    stack: Stack | None = None
    if isinstance(edit, WeightDelta) and (staying or not check):
        stack = Stack(edit, [WeightDelta.load(path) for path in staying], loaded)
        stack.take_out(check=check)
    else:
        try:
            edit.revert_(loaded)
        except ArtifactError as error:
            if not isinstance(edit, WeightDelta) or not edit.keeps_originals:
                raise
            raise ArtifactError(
                f"{error} If other edits are to stay in `{model}`, name their folders (`others`), "
                "or turn the check off (`--no_check`) to subtract the change, up to rounding."
            ) from None
    expected = edit.provenance.base.sha256
    found = weight_hash(loaded) if expected else ""
    is_known = stack is not None and bool(stack.others) and stack.is_verified()
    if check and found != expected and not is_known:
        raise ArtifactError(
            f"What the edit changed in `{model}` is as it was before, but the model has the "
            f"weight hash {found[:12]}…, and the edit's base {expected[:12]}…: another edit is "
            "in it too. Name the folders of all edits that stay (`others`), or keep whatever it "
            "is with `check=False` (`--no_check`)."
        )
    memory = held_memory(loaded, model)
    left_in = [WeightDelta.load(path) for path in staying]
    last = memory or (left_in[-1] if left_in else None)
    earlier = [one for one in left_in if one is not last]
    card = "" if last is None else model_card(last, memory, earlier)
    has_tokenizer = save_model(
        loaded,
        folder,
        source=model,
        card=card,
        memory=memory,
        edits=record_of(staying, folder),
    )
    notes = [] if has_tokenizer else ["The edited model has no tokenizer that could be copied."]
    if expected and found == expected:
        what = "bit" if memory is None else "bit of the weights"
        notes.append(f"Every {what} is that of the base: its weight hash is {expected[:12]}….")
    elif stack is not None and is_known:
        left = ", ".join(f"`{path}`" for path in staying)
        how = "bit for bit what `apply` writes" if len(staying) == 1 else "rounded once"
        notes.append(f"What is left is the base with {left}, {how}.")
    elif stack is not None and stack.subtracted:
        notes.append(
            f"The change was subtracted from {len(stack.subtracted)} parameter(s), since the other "
            "edits in them are not known: what is left is exact up to rounding. With their folders "
            "(`others`) it is exact."
        )
    elif expected:
        notes.append("Other changes are left in the model: it is not the edit's base.")
    else:
        notes.append("The edit does not record its base's hash, so the result was not checked.")
    if memory is not None:
        left = "1 entry" if len(memory) == 1 else f"{len(memory)} entries"
        notes.append(f"The memory still holds {left} of other edits.")
    facts = {"edited model": model, **facts_of(edit)}
    return Written(folder, "restored model", facts, tuple(notes))
