# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Folders of models: what may be replaced, and what is written, whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_edit.core.documents import parse_json, read_text
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import ArtifactError, some_of
from lightning_edit.core.files import atomic_folder, file_hash
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.core.storage import (
    CARD,
    CONFIG,
    foreign_entries,
    provenance_of,
    read_config,
)
from lightning_edit.models import MEMORY_FOLDER, resolve_model
from lightning_edit.rendering.card import CARD_TAG

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "MANIFEST",
    "check_ours",
    "check_output",
    "held_memory",
    "list_files",
    "manifest_of",
    "save_model",
]

# The memory is a submodule of the model.
_OF_MEMORY = f"{MEMORY_FOLDER}."

#: Lists the files of a folder that was written here, which alone may be replaced.
MANIFEST = "lightning_edit.json"

# What a model or an adapter consists of, by which a folder without such a list is known.
_WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors")
_FILES = re.compile(
    r"(adapter_|generation_|tokenizer_)?config\.json|model\.safetensors\.index\.json|README\.md"
    r"|tokenizer\.(json|model)|spiece\.model|sentencepiece\.bpe\.model|chat_template\.jinja"
    r"|(added_tokens|special_tokens_map|vocab)\.json|vocab\.txt|merges\.txt"
)


def check_output(output: str | Path, *, force: bool, inputs: tuple[str | Path, ...] = ()) -> Path:
    """Checks that a folder may be written, before the work that fills it.

    Args:
        output: The folder.
        force: Whether a model or adapter that was written there may be replaced.
        inputs: Folders that are read, and so must not be replaced.

    Raises:
        ArtifactError: If the folder is not empty and ``force`` is not given, or holds one of the
            inputs, or anything else than a model or an adapter written here.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"`{folder}` is a file. Give a folder as `output`.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder
    if not force:
        raise ArtifactError(
            f"The folder `{folder}` is not empty. Give another `output`, or `force` (`--force`) to "
            "replace the model in it."
        )
    for path in map(Path, inputs):
        if path.exists() and path.resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(
                f"`{folder}` cannot be replaced: `{path}` in it is needed. Give another `output`."
            )
    check_ours(folder)
    return folder


def check_ours(folder: Path) -> None:
    """Checks that a folder holds nothing but a model or an adapter that was written here.

    Raises:
        ArtifactError: If it holds anything else.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    listed = _listed(folder)
    ours = listed or {
        name
        for path in folder.iterdir()
        if _FILES.fullmatch(name := path.name) or _WEIGHTS.fullmatch(name)
    }
    has_config = not ours.isdisjoint(("config.json", "adapter_config.json"))
    if not has_config or not any(map(_WEIGHTS.fullmatch, ours)):
        raise ArtifactError(
            f"`{folder}` holds neither a model nor an adapter, so `force` does not replace it. "
            "Give another `output`, or empty the folder yourself."
        )
    foreign = foreign_entries(folder, ours)
    if foreign:
        raise ArtifactError(
            f"`{folder}` holds what is not of a model or an adapter written here, and replacing "
            f"the folder would delete it: {some_of(foreign)}. Give another `output`, "
            "or move that elsewhere."
        )
    if not listed and not _has_our_card(folder):  # version 0.1.0 kept no list
        raise ArtifactError(
            f"`{folder}` holds a model or an adapter that was not written here, as far as anything "
            f"in it says (`{MANIFEST}`), so `force` does not replace it. Give another `output`, or "
            "empty the folder yourself."
        )


def _listed(folder: Path) -> set[str]:
    """The files that were written here and are as they were written; none without a list."""
    try:
        found = manifest_of(folder)
        listed, hashes = found["files"], found.get("sha256", {})
    except (OSError, ValueError, KeyError):
        return set()
    if not isinstance(listed, list) or not isinstance(hashes, dict):
        return set()
    ours = {MANIFEST, *map(str, listed)}
    return ours - {n for n in ours & hashes.keys() if _is_changed(folder / n, hashes[n])}


def _is_changed(path: Path, digest: object) -> bool:
    return path.is_file() and file_hash(path) != digest


def manifest_of(folder: Path) -> dict[str, object]:
    """The list of the files that were written into a folder, with what else it says.

    Raises:
        OSError: If there is none.
        ValueError: If it is damaged.
    """
    found = parse_json(read_text(folder / MANIFEST))
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _has_our_card(folder: Path) -> bool:
    card = folder / CARD
    return card.is_file() and CARD_TAG in card.read_text("utf-8", errors="replace")


def list_files(folder: Path, **more: object) -> None:
    """Lists the files of a folder in it, by which it is known to have been written here.

    Args:
        folder: The folder.
        more: What else is to be known of it, as JSON types.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
    listed = {"format_version": 1, "files": list(hashes), "sha256": hashes, **more}
    text = json.dumps(listed, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def save_model(
    model: PreTrainedModel,
    folder: Path,
    *,
    source: str,
    revision: str | None = None,
    card: str = "",
    memory: MemoryWrite | None = None,
    edits: Sequence[Mapping[str, object]] = (),
) -> bool:
    """Writes a model and its tokenizer as transformers reads them, whole or not at all.

    Args:
        model: The model. A memory beside its weights is no part of them.
        folder: Replaced if it holds a model or an adapter that was written here.
        source: Folder or hub id that the tokenizer is copied from.
        revision: Of a hub id.
        card: Text of ``README.md``, as `model_card` makes it; none is written when empty.
        memory: What the model's memory holds, as `held_memory` gives it, saved in a folder of its
            own.
        edits: The saved edits that are in the model, as `stacks.record_of` gives them.

    Returns:
        Whether there was a tokenizer to copy.

    Raises:
        ArtifactError: If the folder holds anything else.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            resolve_model(source), revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError):
        tokenizer = None
    with atomic_folder(folder, check_ours) as staging, _no_progress_bar():
        weights = {n: t for n, t in model.state_dict().items() if not n.startswith(_OF_MEMORY)}
        model.save_pretrained(staging, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if card:
            (staging / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")
        if memory is not None:
            memory.save(staging / MEMORY_FOLDER)
        list_files(staging, edits=list(edits))
    return tokenizer is not None


def held_memory(
    model: PreTrainedModel, source: str, edit: Edit | None = None
) -> MemoryWrite | None:
    """What a model's memory holds, as an edit of the weights that the model has.

    Args:
        model: The model.
        source: What it was loaded from; where this is a folder with a memory, that tells where the
            memory comes from.
        edit: What was applied to the model since.

    Returns:
        The edit that brings an empty memory to what it holds; None where there is nothing.
    """
    memory = EditMemory.find(model)
    if memory is None or not len(memory):
        return None
    earlier = Path(source).expanduser() / MEMORY_FOLDER
    provenance = Provenance()
    if isinstance(edit, MemoryWrite) and edit.provenance.method:
        provenance = edit.provenance
    elif (earlier / CONFIG).is_file():
        provenance = provenance_of(read_config(earlier))
    base, digest = provenance.base, weight_hash(model)
    if base.sha256 != digest:
        dtype = str(model.dtype).removeprefix("torch.")
        base = BaseModelInfo(source, None, dtype, digest, model.num_parameters())
    held = MemoryWrite.of(model)
    held.provenance = provenance.holding(memory.requests, base)
    return held


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
