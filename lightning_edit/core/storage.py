# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""How an edit lies on disk: a JSON description, a safetensors file and a card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_edit.core.edit import BaseModelInfo, Provenance
from lightning_edit.core.errors import ArtifactError

if TYPE_CHECKING:
    from lightning_edit.core.delta import Change, WeightDelta

__all__ = ["FORMAT_VERSION", "atomic_folder", "load_delta", "save_delta"]

FORMAT_VERSION = 1
CONFIG = "delta_config.json"
TENSORS = "delta.safetensors"
CARD = "README.md"


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to fill, which takes the place of ``folder`` only when all went well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            os.replace(folder, retired / folder.name)
            os.replace(staging, folder)
            shutil.rmtree(retired)
        else:
            os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_delta(delta: WeightDelta, folder: Path, *, originals: bool) -> Path:
    """Writes an edit; see :meth:`lightning_edit.core.delta.WeightDelta.save`."""
    from safetensors.torch import save_file

    from lightning_edit.core.delta import LowRank

    tensors: dict[str, Tensor] = {}
    for name, change in delta.changes.items():
        if isinstance(change, LowRank):
            tensors[f"{name}.u"], tensors[f"{name}.v"] = change.u, change.v
        else:
            tensors[f"{name}.dense"] = change
    if originals:
        for name in delta.changes:
            if name in delta.originals:
                tensors[f"{name}.original"] = delta.originals[name]
    # Factors of several sites may share storage, which safetensors refuses.
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    config = {
        "format_version": FORMAT_VERSION,
        "kind": "weight_delta",
        **asdict(delta.provenance),
        "parameters": {
            name: {
                "shape": list(change.shape),
                "rank": change.rank if isinstance(change, LowRank) else None,
                "original_sha256": delta.hashes.get(name, ("", ""))[0],
                "edited_sha256": delta.hashes.get(name, ("", ""))[1],
            }
            for name, change in delta.changes.items()
        },
        "norm": delta.norm(),
    }
    with atomic_folder(folder) as staging:
        save_file(tensors, staging / TENSORS, metadata={"format": "pt"})
        (staging / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        (staging / CARD).write_text(_card(delta, config))
    return folder


def load_delta(folder: Path) -> dict[str, Any]:
    """Reads the constructor arguments of a :class:`~lightning_edit.core.delta.WeightDelta`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from lightning_edit.core.delta import LowRank

    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise ArtifactError(
                f"`{folder}` holds no saved edit: the file `{file}` is missing. Name the folder "
                f"that has `{CONFIG}` and `{TENSORS}` in it."
            )
    try:
        config = json.loads((folder / CONFIG).read_text())
        version = int(config["format_version"])
        parameters = {str(name): dict(entry) for name, entry in config["parameters"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"`{folder / CONFIG}` is damaged ({error!r}). Restore the file from a backup."
        ) from None
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"`{folder}` was written in format {version}, newer than {FORMAT_VERSION}, which this "
            "version of lightning_edit reads. Upgrade with `pip install -U lightning-edit`."
        )
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"`{folder / TENSORS}` is damaged ({error}). Restore the file from a backup, or make "
            "the edit again."
        ) from None
    changes: dict[str, Change] = {}
    for name, entry in parameters.items():
        if f"{name}.dense" in tensors:
            changes[name] = tensors[f"{name}.dense"]
        elif f"{name}.u" in tensors and f"{name}.v" in tensors:
            changes[name] = LowRank(tensors[f"{name}.u"], tensors[f"{name}.v"])
        else:
            raise ArtifactError(f"`{folder / TENSORS}` lacks the change of `{name}`.")
        if list(changes[name].shape) != entry.get("shape"):
            raise ArtifactError(
                f"`{folder}`: `{CONFIG}` gives `{name}` the shape {entry.get('shape')}, but "
                f"`{TENSORS}` has {list(changes[name].shape)}. The files do not belong together."
            )
    _check_finite(folder, tensors)
    return {
        "changes": changes,
        "provenance": Provenance(
            method=config.get("method", ""),
            paper=config.get("paper", ""),
            settings=config.get("settings", {}),
            base=BaseModelInfo(**config.get("base", {})),
            request_ids=tuple(config.get("request_ids", ())),
        ),
        "originals": {
            name: tensors[f"{name}.original"]
            for name in parameters
            if f"{name}.original" in tensors
        },
        "hashes": {
            name: (entry["original_sha256"], entry["edited_sha256"])
            for name, entry in parameters.items()
            if entry.get("edited_sha256")
        },
    }


def _check_finite(folder: Path, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ArtifactError(
                f"`{folder / TENSORS}`: `{name}` holds values that are not finite. Applying it "
                "would destroy the model; make the edit again."
            )


def _card(delta: WeightDelta, config: dict[str, Any]) -> str:
    provenance = delta.provenance
    base = provenance.base
    front = ["---", "library_name: lightning_edit", "tags:", "- knowledge-editing"]
    if provenance.method:
        front.append(f"- {provenance.method.lower()}")
    if base.id:
        front.append(f"base_model: {json.dumps(base.id)}")
    front.append("---")
    rows = [
        f"| `{name}` | {list(change.shape)} | {config['parameters'][name]['rank'] or 'dense'} |"
        for name, change in delta.changes.items()
    ]
    method = provenance.method or "WeightDelta"
    about = [f"# An edit of {base.id or 'a language model'}", ""]
    about.append(
        f"Made with {method}{f' ({provenance.paper})' if provenance.paper else ''}; "
        f"{len(provenance.request_ids)} request(s), ‖Δ‖ = {config['norm']:.4g}."
    )
    if base.sha256:
        about += ["", f"It belongs to the weights with the hash `{base.sha256}` ({base.dtype})."]
    return "\n".join(
        [
            *front,
            "",
            *about,
            "",
            "| parameter | shape | rank |",
            "|---|---|---|",
            *rows,
            "",
            "```python",
            "from lightning_edit import WeightDelta",
            "",
            'delta = WeightDelta.load("path/to/this/folder")',
            "delta.apply_(model)   # checks that the model is the base named above",
            "delta.revert_(model)  # gives back every bit",
            "```",
            "",
            "An edited model states what it was told to state, true or not. Say so where it is used.",
            "",
        ]
    )
