# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Saved edits and the models that they belong to, as the verbs name them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_edit.artifacts.catalog import find_edit
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import ArtifactError, ModelError
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.core.storage import CONFIG
from lightning_edit.models import DTypeName, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "apply_once",
    "base_name",
    "facts_of",
    "load_base",
    "named_by",
    "open_edit",
    "open_edit_or_model",
    "revision_of",
    "undo_note",
]


def open_edit(name: str) -> tuple[Path, Edit]:
    """A saved edit of either kind, and its folder.

    Args:
        name: The folder, or that of the run that saved it.

    Raises:
        ArtifactError: If there is none, or it is damaged.
    """
    folder = find_edit(Path(name).expanduser())
    return folder, Edit.load(folder)


def open_edit_or_model(name: str) -> Edit | nn.Module:
    """A saved edit where there is one, else a model in the number format it is stored in.

    Args:
        name: The folder of an edit, of a run or of a model, or another name of a model.

    Raises:
        ArtifactError: If an edit is damaged.
        ModelError: If a model cannot be loaded.
    """
    folder = find_edit(Path(name).expanduser())
    return Edit.load(folder) if (folder / CONFIG).is_file() else load_model(name, dtype="auto")


def base_name(edit: Edit, folder: Path, model: str | None) -> str:
    """The base of an edit: as named by the caller, or else as the edit records it.

    Raises:
        ArtifactError: If neither names it.
    """
    name = model or edit.provenance.base.id
    if not name:
        raise ArtifactError(
            f"The edit in `{folder}` does not record its base model. Name it with `model`."
        )
    return name


def revision_of(edit: Edit, source: str) -> str | None:
    """The revision of a base, where it is the one that the edit records."""
    base = edit.provenance.base
    return base.revision if source == base.id else None


@contextmanager
def named_by(edit: Edit, *, given: bool) -> Iterator[None]:
    """Context manager: says where the name of a model that cannot be loaded comes from."""
    try:
        yield
    except ModelError as error:
        if given:
            raise
        raise ModelError(
            f"The edit records its base model as `{edit.provenance.base.id}`, which cannot be "
            f"loaded. If it lies elsewhere, name it with `model`. {error}"
        ) from error


def load_base(edit: Edit, source: str, *, given: bool) -> PreTrainedModel:
    """Loads the base of an edit in the number format that the edit was made in.

    Args:
        edit: The edit.
        source: Name of the base.
        given: Whether the caller named it.

    Raises:
        ModelError: If it cannot be loaded.
    """
    dtype: DTypeName = "auto"
    match edit.provenance.base.dtype:
        case "float32" | "bfloat16" | "float16" as name:
            dtype = name
    with named_by(edit, given=given):
        return load_model(source, revision=revision_of(edit, source), dtype=dtype)


def apply_once(edit: Edit, model: PreTrainedModel, dtype: str | None, *, check: bool) -> None:
    """Applies an edit so that the change is rounded once, to the number format asked for.

    Args:
        edit: The edit.
        model: Its base; it is converted in place.
        dtype: Name of the number format; that of the model if None.
        check: Whether the model must have the weights that the edit records.

    Raises:
        ArtifactError: If the edit does not belong to the model.
    """
    kind: torch.dtype = getattr(torch, dtype) if dtype else model.dtype
    if torch.finfo(kind).eps >= torch.finfo(model.dtype).eps:
        edit.apply_(model, check=check)
        _convert_(model, kind)
        return
    if check:
        edit.check_base(model)
    _convert_(model, kind)
    edit.apply_(model, check=False)


def _convert_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Converts weights, and leaves what a memory holds as exact as it is."""
    memory = EditMemory.find(model)
    entries = memory.entries if memory is not None else {}
    model.to(dtype)
    if memory is not None:
        memory.write(entries)


def facts_of(edit: Edit) -> dict[str, str | float]:
    """What is to be known of an edit, name -> value."""
    ids = edit.provenance.request_ids
    facts: dict[str, str | float] = {}
    if edit.provenance.method:
        facts["method"] = edit.provenance.method
    if ids:
        facts["requests"] = f"{len(ids)}: {', '.join(ids[:5])}{', …' if len(ids) > 5 else ''}"
    if isinstance(edit, MemoryWrite):
        entries = "1 entry" if len(edit) == 1 else f"{len(edit)} entries"
        facts["changed"] = f"{entries} of a memory ({edit.kind})"
    if isinstance(edit, WeightDelta):
        names = list(edit.changes)
        facts["changed"] = names[0] if len(names) == 1 else f"{len(names)} parameters"
    facts["‖Δ‖"] = edit.norm()
    return facts


def undo_note(
    saved: Edit,
    applied: Edit,
    artifact: Path,
    folder: Path,
    *,
    is_as_recorded: bool,
    is_base: bool,
) -> Iterator[str]:
    """How to take an edit out of the model that was written, or why that cannot be done exactly.

    Args:
        saved: The edit as it was saved.
        applied: The same, which has since been applied.
        artifact: Folder of the saved edit.
        folder: Folder of the written model.
        is_as_recorded: Whether the model is written in the number format of the edit's base.
        is_base: Whether the edit was applied to its base, or to that with other edits that are
            known.
    """
    if not saved.keeps_originals:
        yield "The edit was saved without originals, so it cannot be undone exactly."
        return
    if isinstance(saved, MemoryWrite) and isinstance(applied, MemoryWrite):
        for name, entry in applied.replaced.items():
            before = saved.replaced[name]
            if entry is None if before is None else before.equals(entry):
                continue
            yield (
                f"The memory did not hold what the saved edit keeps of {name!r}, so the edit "
                "cannot be undone exactly."
            )
            return
    if is_as_recorded:
        words = ("lightning-edit", "revert", str(artifact), "--model", str(folder))
        if is_base or not saved.changes_weights:
            yield f"Undo with: {shlex.join(words)}"
        else:
            yield f"Undo, up to rounding, with: {shlex.join((*words, '--no_check'))}"
