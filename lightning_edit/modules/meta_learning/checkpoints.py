# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of trained editors: what is in them, and taking a network out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_edit.checkpoints import read_checkpoint
from lightning_edit.core.errors import ArtifactError, some_of
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.fitting import EditState
from lightning_edit.optim import E

__all__ = [
    "NETWORK",
    "EditorCheckpoint",
    "EditorRecord",
    "complete_checkpoint",
    "editor_record",
    "read_editor",
    "take_network",
]

#: What the names of the network's tensors begin with.
NETWORK = "network."
#: The tensor by which gradients are divided; checkpoints of version 0.1.0 have none.
DIVISOR = f"{NETWORK}divisor"


class EditorRecord(TypedDict):
    """What was trained."""

    #: Name of the method's class, and its arguments.
    method: str
    settings: dict[str, object]
    #: Names of the parameters that the network belongs to.
    parameters: list[str]


class EditingRecord(TypedDict):
    """What an editor's checkpoint knows beside tensors."""

    base_sha256: str
    edit_state: EditState
    editor: EditorRecord


class Progress(TypedDict):
    """How far a loop of the Trainer is."""

    total: dict[str, int]


class Loaders(TypedDict):
    """Where data loaders are."""

    combined_loader: list[dict[str, int]]


FitLoop = TypedDict(
    "FitLoop", {"epoch_loop.batch_progress": Progress, "state_dict": Loaders}, total=False
)


class EditorCheckpoint(TypedDict):
    """The part of a Trainer's checkpoint that a trained editor needs."""

    state_dict: dict[str, Tensor]
    lightning_edit: EditingRecord
    loops: NotRequired[dict[str, FitLoop]]


def editor_record(editor: EditModule[E], parameters: list[str]) -> EditorRecord:
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
    found = cast(EditorCheckpoint, saved)
    about = found["lightning_edit"]["editor"]
    if _averages(about):
        about["settings"]["average"] = True
    return found


def _averages(about: EditorRecord) -> bool:
    """Whether a training took gradients of the mean loss of several requests of an edit."""
    settings = about["settings"]
    # Before there was `average`, MEND always did.
    always = about["method"] == "MEND" and settings["edits_at_once"] != 1
    return bool(settings.get("average", always))


def complete_checkpoint(
    editor: EditModule[Any], network: nn.Module, saved: EditorCheckpoint, where: str
) -> None:
    """Gives a checkpoint of an earlier version what it lacks, and warns of what cannot be given.

    In version 0.1.0 gradients were of the mean loss of a pass or of an edit. So what they are
    divided by is the number of target tokens of a pass in training, reckoned from how many rows
    the statistics have seen.

    Args:
        editor: The editor.
        network: Its network.
        saved: The checkpoint, which is completed in place.
        where: Its name in warnings.
    """
    if _averages(saved["lightning_edit"]["editor"]) and not editor.hparams.get("average"):
        rank_zero_warn(
            f"`{where}` was trained with the mean loss of an edit's requests, by which each of n "
            "is written at about 1/n. Here they add up. Set `average=True`, or train it anew."
        )
    state = saved["state_dict"]
    if DIVISOR in state or "divisor" not in dict(network.named_buffers()):
        return
    tokens = 0.0 if editor.tree.is_encoder_decoder else _tokens_of_a_pass(saved)
    if not tokens:
        rank_zero_warn(
            f"`{where}` was written by an earlier version, and does not tell how large the passes "
            "of its training were. So gradients are divided by the tokens of their own edit, as "
            "they were then. Edit with about as many requests at once as in training, or train it "
            "anew."
        )
    state[DIVISOR] = torch.tensor(tokens)


def _tokens_of_a_pass(saved: EditorCheckpoint) -> float:
    """Mean number of target tokens of a pass in training; 0 where it is not to be known."""
    about, state = saved["lightning_edit"]["editor"], saved["state_dict"]
    settings, loop = about["settings"], saved.get("loops", {}).get("fit_loop", {})
    batches = loop.get("epoch_loop.batch_progress", {"total": {}})["total"].get("ready", 0)
    loaders = loop.get("state_dict", {"combined_loader": []})["combined_loader"]
    size = loaders[0].get("batch_size", 0) if loaders else 0
    if not batches or not size:
        return 0.0
    rows = sum(float(tensor) for name, tensor in state.items() if name.endswith(".total"))
    a_request = rows / len(about["parameters"]) / batches / size
    at_once, sequence = (int(str(settings[name])) for name in ("micro_batch_size", "sequence"))
    requests = min(at_once, -(-size // sequence))
    return a_request * float(requests)


def take_network(
    editor: EditModule[E],
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
            f"`{where}` was trained to edit {some_of(trained_for)}, but here "
            f"{some_of(parameters)} are to be edited. Use the model, `layers` and `modules` "
            "that it was trained with."
        )
    if not any_base and own["base_sha256"] != editor.base.sha256:
        raise ArtifactError(
            f"`{where}` was trained with the base weights {own['base_sha256'][:12]}…, but "
            f"{editor.model_id} has {editor.base.sha256[:12]}…: it is another model, or it has "
            "been edited already. Load the one it was trained with, or set `any_base` to edit "
            "this one anyway."
        )
    complete_checkpoint(editor, network, saved, where)
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
