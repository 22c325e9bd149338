# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of trained editors: what is in them, and taking a network out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, cast

from torch import Tensor, nn

from lightning_edit.checkpoints import read_checkpoint
from lightning_edit.core.errors import ArtifactError
from lightning_edit.modules.base import EditModule

__all__ = [
    "NETWORK",
    "EditorCheckpoint",
    "EditorRecord",
    "editor_record",
    "read_editor",
    "take_network",
]

#: What the names of the network's tensors begin with.
NETWORK = "network."


class EditorRecord(TypedDict):
    """What was trained."""

    #: Name of the method's class, and its arguments.
    method: str
    settings: dict[str, Any]
    #: Names of the parameters that the network belongs to.
    parameters: list[str]


class EditingRecord(TypedDict):
    """What an editor's checkpoint knows beside tensors."""

    base_sha256: str
    edit_state: dict[str, Any]
    editor: EditorRecord


class EditorCheckpoint(TypedDict):
    """The part of a Trainer's checkpoint that a trained editor needs."""

    state_dict: dict[str, Tensor]
    lightning_edit: EditingRecord


def editor_record(editor: EditModule[Any], parameters: list[str]) -> EditorRecord:
    """The record of an editor that is being trained.

    Args:
        editor: The editor.
        parameters: Names of the parameters that its network belongs to.
    """
    settings = {k: v for k, v in editor.hparams.items() if not k.startswith("_")}
    return {"method": type(editor).__name__, "settings": settings, "parameters": parameters}


def read_editor(checkpoint: str | Path) -> EditorCheckpoint:
    """Reads a checkpoint of a trained editor.

    Args:
        checkpoint: A file that training an editor has written.

    Raises:
        ArtifactError: If there is none, or it is of something else.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise ArtifactError(
            f"There is no checkpoint `{checkpoint}`. Give a file that training an editor, "
            "such as MEND, has written."
        )
    saved = read_checkpoint(path)
    if "editor" not in saved.get("lightning_edit", {}):
        raise ArtifactError(
            f"`{checkpoint}` holds no trained editor. Give a file that training an editor (KE, "
            "MEND, MALMEN, RLEdit or SERAC) has written."
        )
    return cast(EditorCheckpoint, saved)


def take_network(
    editor: EditModule[Any],
    network: nn.Module,
    parameters: list[str],
    saved: EditorCheckpoint,
    where: str,
    *,
    any_base: bool,
) -> None:
    """Takes a trained network out of a checkpoint, and the state of the training with it.

    Args:
        editor: The editor that it shall be of.
        network: The editor's network, which gets the tensors.
        parameters: Names of the parameters that the editor edits.
        saved: The checkpoint.
        where: Its name in errors.
        any_base: Edit a model with other weights than those it was trained with.

    Raises:
        ArtifactError: If it is of another method or model, or does not fit.
    """
    own = saved["lightning_edit"]
    method, trained_for = own["editor"]["method"], own["editor"]["parameters"]
    if method != type(editor).__name__:
        raise ArtifactError(
            f"`{where}` holds a {method}, not a {type(editor).__name__}. Use that method, or "
            "`TrainedEditor`, which asks the checkpoint."
        )
    if trained_for != parameters:
        raise ArtifactError(
            f"`{where}` was trained to edit {', '.join(trained_for)}, but here "
            f"{', '.join(parameters)} are to be edited. Use the model, `layers` and `modules` "
            "that it was trained with."
        )
    if not any_base and own["base_sha256"] != editor.base.sha256:
        raise ArtifactError(
            f"`{where}` was trained with the base weights {own['base_sha256'][:12]}…, but "
            f"{editor.model_id} has {editor.base.sha256[:12]}…: it is another model, or it has "
            "been edited already. Load the one it was trained with, or set `any_base` to edit "
            "this one anyway."
        )
    state = {
        name.removeprefix(NETWORK): tensor
        for name, tensor in saved["state_dict"].items()
        if name.startswith(NETWORK)
    }
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ArtifactError(
            f"`{where}` does not fit the network that these settings make: {error}"
        ) from None
    editor.load_edit_state(own["edit_state"])
