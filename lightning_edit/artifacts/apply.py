# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A saved edit written into its base model."""

# torch is imported when the function runs, so that help on the command line does not wait for it.

from __future__ import annotations

import copy
from typing import Literal

from lightning_edit.artifacts.outcomes import Written

__all__ = ["apply"]


def apply(
    delta: str,
    model: str | None = None,
    output: str = "edited",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    check: bool = True,
    force: bool = False,
) -> Written:
    """Writes an edited copy of a model: the base model plus a saved edit.

    The result is a folder of safetensors, configuration and tokenizer, which every program that
    reads Hugging Face models can read. An edit of a memory leaves the weights as they are: the
    memory lies in `edit_memory` in that folder, from which `lightning_edit.load_model` loads the
    model with it, and every other program the base without it.

    Args:
        delta: Folder of the saved edit, or of the run that saved it.
        model: The base model: a folder, a hub id, a GGUF file or `smollm2`. By default the one
            that the edit names.
        output: Folder to write.
        dtype: Number format of the written model. By default that of the model the edit was made
            in.
        check: Compare the hash of the weights with that of the edit's base. Turn this off to add
            the edit to another model on purpose.
        force: Replace a model that lies in the output folder.

    Returns:
        What was written.

    Raises:
        ArtifactError: If the edit is damaged or belongs to other weights, or the output folder
            must not be replaced.
        ModelError: If the model cannot be loaded.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> from lightning_edit import WeightDelta
        >>> folder, base = getfixture("tmp_path"), tiny_model()
        >>> base.save_pretrained(folder / "base")
        >>> delta = {"model.norm.weight": base.model.norm.weight.detach()}
        >>> _ = WeightDelta(delta).save(folder / "delta")
        >>> done = apply(str(folder / "delta"), str(folder / "base"), str(folder / "edited"))
        >>> done.what, sorted(path.name for path in done.folder.iterdir())[:2]
        ('edited model', ['README.md', 'config.json'])
    """
    from lightning_edit.artifacts.cards import model_card
    from lightning_edit.artifacts.folders import check_output, held_memory, save_model
    from lightning_edit.artifacts.sources import (
        apply_once,
        base_name,
        facts_of,
        load_base,
        open_edit,
        revision_of,
        undo_note,
    )
    from lightning_edit.artifacts.stacks import applied_to, record_of
    from lightning_edit.core.delta import WeightDelta
    from lightning_edit.core.hashing import weight_hash

    artifact, edit = open_edit(delta)
    base, saved = edit.provenance.base, copy.copy(edit)
    source = base_name(edit, artifact, model)
    folder = check_output(output, force=force, inputs=(artifact, source))
    loaded = load_base(edit, source, given=model is not None)
    earlier = applied_to(source)
    is_base = check or bool(earlier) or base.sha256 in ("", weight_hash(loaded))
    apply_once(edit, loaded, dtype, check=check)
    memory = held_memory(loaded, source, edit)
    stack = [*earlier, *([artifact] if edit.changes_weights else [])]
    has_tokenizer = save_model(
        loaded,
        folder,
        source=source,
        revision=revision_of(edit, source),
        card=model_card(edit, memory, [WeightDelta.load(path) for path in earlier]),
        memory=memory,
        edits=record_of(stack, folder),
    )
    notes = [] if has_tokenizer else ["The base has no tokenizer that could be copied."]
    if check and not base.sha256:
        notes.append("The edit does not record its base's hash, so the base was not checked.")
    if memory is not None:
        notes.append(
            "`lightning_edit.load_model` loads the model with its memory, other programs without."
        )
    is_as_recorded = dtype in (None, base.dtype)
    notes += undo_note(
        saved, edit, artifact, folder, is_as_recorded=is_as_recorded, is_base=is_base
    )
    kind = str(loaded.dtype).removeprefix("torch.")
    facts = {"base": source, **facts_of(edit), "dtype": kind}
    return Written(folder, "edited model", facts, tuple(notes))
