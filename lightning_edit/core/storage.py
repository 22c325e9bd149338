# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""How an edit lies on disk: a JSON description, a safetensors file and a card."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from lightning_edit.core.documents import parse_json
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.files import atomic_folder, content_hash, file_hash
from lightning_edit.core.provenance import BaseModelInfo, Provenance, utc_now
from lightning_edit.core.request import EditRequest
from lightning_edit.core.schema import DTYPES, check_description, check_header, version_of
from lightning_edit.core.tensor_files import tensors_in
from lightning_edit.rendering.card import CARD_TAG, make_card

if TYPE_CHECKING:
    from lightning_edit.core.edit import Edit
    from lightning_edit.core.side_memory import MemoryRecord

__all__ = [
    "CONFIG",
    "FORMAT_VERSION",
    "TENSORS",
    "EditAbout",
    "EditConfig",
    "EntryRecord",
    "MemoryKind",
    "ParameterRecord",
    "foreign_entries",
    "provenance_of",
    "read_config",
    "read_tensors",
    "save_artifact",
]

#: 2: the description has a hash of its own, and that of the tensors is never left out.
FORMAT_VERSION = 2
CONFIG = "delta_config.json"
TENSORS = "delta.safetensors"
CARD = "README.md"


class ParameterRecord(TypedDict):
    """What the description of an edit says of a parameter that it changes."""

    shape: list[int]
    #: None for a dense change.
    rank: int | None
    #: Empty where they are not known.
    original_sha256: str
    edited_sha256: str


class EntryRecord(TypedDict):
    """What it says of an entry of a memory: the id alone where there is none."""

    id: str
    requests: NotRequired[dict[str, MemoryRecord]]
    notes: NotRequired[MemoryRecord]


class MemoryKind(TypedDict):
    """Name of a memory's class, and what it is built from."""

    kind: str
    settings: dict[str, object]


class EditAbout(TypedDict):
    """What an edit changes: parameters, or entries of a memory."""

    parameters: dict[str, ParameterRecord]
    memory: NotRequired[MemoryKind]
    entries: NotRequired[list[EntryRecord]]
    replaced: NotRequired[list[EntryRecord]]
    #: Ids of all entries before the edit.
    order: NotRequired[list[str]]


class EditConfig(EditAbout):
    """The description of a saved edit, ``delta_config.json``, as ``read_config`` gives it."""

    format_version: int
    kind: NotRequired[str]
    method: NotRequired[str]
    paper: NotRequired[str]
    settings: NotRequired[dict[str, object]]
    base: BaseModelInfo
    request_ids: tuple[str, ...]
    requests: tuple[EditRequest, ...]
    created: str
    norm: NotRequired[float]
    tensors_sha256: NotRequired[str]


def save_artifact(edit: Edit, folder: Path, tensors: dict[str, Tensor], about: EditAbout) -> Path:
    """Writes an edit's folder: description, tensors and card.

    Args:
        edit: The edit, whose kind, provenance and norm are written.
        folder: Created if need be; files of an earlier edit in it are replaced.
        tensors: Name to tensor.
        about: What the description says beside provenance and norm.

    Returns:
        The folder.

    Raises:
        ArtifactError: If the folder is a file, or holds other things, or a value is not finite.
    """
    from safetensors.torch import save_file

    # Factors of several sites may share storage, which safetensors refuses.
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    _check_finite(folder, tensors, "Nothing was saved")
    norm = edit.norm()
    provenance = replace(edit.provenance, created=edit.provenance.created or utc_now())
    config: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "kind": edit.artifact_kind,
        **asdict(provenance),
        "requests": [request.to_dict() for request in provenance.requests],
        **about,
        "norm": norm,
    }
    with atomic_folder(folder, _check_place) as staging:
        save_file(tensors, staging / TENSORS, metadata={"format": "pt"})
        config["tensors_sha256"] = file_hash(staging / TENSORS)
        config["sha256"] = content_hash(config)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        # Half of a surrogate pair, which an id may hold, has no UTF-8; JSON reads \udxxx back.
        (staging / CONFIG).write_text(text, encoding="utf-8", errors="backslashreplace")
        card = _card(edit, about, norm)
        (staging / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")
    return folder


def read_tensors(folder: Path, config: EditConfig) -> dict[str, Tensor]:
    """Reads the tensors that ``save_artifact`` wrote.

    Args:
        folder: A saved edit.
        config: Its description, by ``read_config``.

    Raises:
        ArtifactError: If the file is missing or damaged, or belongs to another description.
    """
    if not (folder / TENSORS).is_file():
        raise ArtifactError(
            f"`{folder}` holds no saved edit: the file `{TENSORS}` is missing. Name the folder "
            f"that has `{CONFIG}` and `{TENSORS}` in it."
        )
    try:
        expected = config.get("tensors_sha256")
        if expected and file_hash(folder / TENSORS) != expected:
            raise ValueError(f"its hash is not {str(expected)[:12]}…, as `{CONFIG}` says")
        check_header(folder / TENSORS)
        tensors = tensors_in(folder / TENSORS)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"`{folder / TENSORS}` is damaged ({error}). Restore the file from a backup, or make "
            "the edit again."
        ) from None
    _check_finite(folder, tensors, "Applying it would destroy the model")
    return tensors


def provenance_of(config: EditConfig) -> Provenance:
    """Where an edit comes from, by its description."""
    return Provenance(
        method=config.get("method", ""),
        paper=config.get("paper", ""),
        settings=config.get("settings", {}),
        base=config["base"],
        request_ids=config["request_ids"],
        requests=config["requests"],
        created=config["created"],
    )


def read_config(folder: Path) -> EditConfig:
    """Reads the description of a saved edit, without its tensors.

    Raises:
        ArtifactError: If it is missing, damaged or of a newer format.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ArtifactError(
            f"`{folder}` holds no saved edit: the file `{CONFIG}` is missing. Name the folder "
            f"that has `{CONFIG}` and `{TENSORS}` in it."
        )
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        version = version_of(found)
        if version <= FORMAT_VERSION:
            described = check_description(found)
            is_sealed = version > 1 or "sha256" in described
            if is_sealed and described.get("sha256") != content_hash(described):
                raise ValueError("its content is not that of which its `sha256` is")
            if version > 1 and not described.get("tensors_sha256"):
                raise ValueError("the hash of the tensors, `tensors_sha256`, is missing")
            read: dict[str, object] = {
                **described,
                "base": BaseModelInfo(**described.get("base", {})),
                "entries": described.get("entries", []),
                "request_ids": tuple(described.get("request_ids", ())),
                "requests": tuple(map(EditRequest.from_dict, described.get("requests", ()))),
                "created": described.get("created", ""),
            }
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"`{path}` is damaged ({error}). Restore the file from a backup."
        ) from None
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"`{folder}` was written in format {version}, newer than {FORMAT_VERSION}, which this "
            "version of lightning_edit reads. Upgrade with `pip install -U lightning-edit`."
        )
    return cast(EditConfig, read)


def _check_place(folder: Path) -> None:
    """Refuses to replace a folder with other things in it, which would be deleted."""
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"`{folder}` is a file. Give a folder to save the edit in.")
    others = foreign_entries(folder, {CONFIG, TENSORS, CARD})
    if others:
        raise ArtifactError(
            f"`{folder}` holds other files ({', '.join(others[:3])}), which saving would "
            f"delete. Give the edit a folder of its own, such as `{folder / 'delta'}`."
        )
    if (folder / TENSORS).exists() and not _is_edit(folder):
        raise ArtifactError(
            f"`{folder}` holds a `{TENSORS}` without the description of a saved edit, so that it "
            "may be somebody else's. Give the edit another folder, or empty this one yourself."
        )


def _is_edit(folder: Path) -> bool:
    """Whether a folder's description is one of ours, be its content damaged or not."""
    try:
        found = parse_json((folder / CONFIG).read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"format_version", "parameters"} <= found.keys()


def foreign_entries(folder: Path, ours: Collection[str]) -> list[str]:
    """What lies in a folder beside files of ours: names, those of folders with a slash.

    A link is foreign, whatever its name, and so is a card that says nothing of an edit.

    Args:
        folder: The folder; it may be missing.
        ours: Paths of our files in it.
    """
    parents = {str(parent) for name in ours for parent in PurePosixPath(name).parents}
    foreign = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        is_ours = name in parents if path.is_dir() else name in ours and path.is_file()
        if name == CARD and is_ours:
            is_ours = CARD_TAG in path.read_text("utf-8", errors="replace")
        if path.is_symlink() or not is_ours:
            first = name.partition("/")[0]
            foreign.add(f"{first}/" if (folder / first).is_dir() else first)
    return sorted(foreign)


def _check_finite(folder: Path, tensors: Mapping[str, Tensor], why: str) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            continue
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(
                f"`{folder / TENSORS}`: `{name}` holds values that are not finite. {why}; make "
                "the edit again."
            )


def _card(edit: Edit, about: EditAbout, norm: float) -> str:
    kind, provenance = type(edit).__name__, edit.provenance
    code = [
        f"from lightning_edit import {kind}",
        "",
        f'delta = {kind}.load("path/to/this/folder")',
        "delta.apply_(model)   # checks that the model is the base named above",
        "delta.revert_(model)  # gives back every bit",
    ]
    return make_card(
        "edit",
        library="lightning_edit",
        method=provenance.method,
        kind=kind,
        base=provenance.base.id,
        paper=provenance.paper,
        request_ids=provenance.request_ids,
        requests=provenance.requests,
        sha256=provenance.base.sha256,
        norm=norm if edit.changes_weights else None,
        parameters=about["parameters"],
        entries=None if edit.changes_weights else about["entries"],
        code="\n".join(code),
    )
