# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What the verbs on saved edits return: plain data, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightning_edit.report.results import RunReport

__all__ = [
    "Comparison",
    "EntryChange",
    "EntryRow",
    "Offer",
    "OfferKind",
    "ParameterRow",
    "Patch",
    "Rendered",
    "SavedEdit",
    "ServedName",
    "ServedPatches",
    "ServerContents",
    "Survived",
    "SurvivedEdit",
    "Written",
]

EntryChange = Literal["added", "replaced", "removed", "written"]
OfferKind = Literal["methods", "metrics", "data", "callbacks", "models", "configs"]


@dataclass(frozen=True)
class Written:
    """A folder that was written.

    Args:
        folder: Where it is.
        what: What it holds: ``edited model``, ``restored model`` or ``LoRA adapter``.
        facts: What is to be known of it, name -> value.
        notes: What is to be said besides.
    """

    folder: Path
    what: str
    facts: Mapping[str, str | float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """The report of a run, written again.

    Args:
        report: What the run came to.
        files: The files that were written.
        text: The table of the metrics, where it was asked for as text.
    """

    report: RunReport
    files: tuple[Path, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class ParameterRow:
    """What two edits, or the change from one model to the other, do to one parameter.

    Args:
        name: Of the parameter.
        norm_first: ‖Δ‖ (Frobenius) of the first edit; None where it leaves the parameter alone.
        norm_second: ‖Δ‖ of the second edit, or of the change from the first model to the second.
        relative_first: ‖Δ‖ / ‖W‖, where the original W is known.
        relative_second: The same of the second.
        rank_first: Rank of the change; None where it is not known or above 64.
        rank_second: The same of the second.
        cosine: ⟨Δ₁, Δ₂⟩ / (‖Δ₁‖ ‖Δ₂‖) where both change the parameter: 1 if they do the same, 0
            if they have nothing in common.
    """

    name: str
    norm_first: float | None = None
    norm_second: float | None = None
    relative_first: float | None = None
    relative_second: float | None = None
    rank_first: int | None = None
    rank_second: int | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class EntryRow:
    """What two edits, or the change from one model to the other, do to one entry of a memory.

    Args:
        name: Id of the entry.
        requests: Ids of the requests that it answers.
        first: What the first edit does: `written` where it was saved without what it replaces;
            None where it leaves the entry alone.
        second: What the second edit does, or the change from the first model to the second.
        norm_first: Frobenius norm of the entry of the first edit, over all its tensors; None where
            there is none.
        norm_second: The same of the second.
        is_same: Whether both write the same entry, bit for bit; None unless both write or remove
            it.
    """

    name: str
    requests: tuple[str, ...] = ()
    first: EntryChange | None = None
    second: EntryChange | None = None
    norm_first: float | None = None
    norm_second: float | None = None
    is_same: bool | None = None


@dataclass(frozen=True)
class Comparison:
    """What two edits or models have in common.

    Args:
        first: Name of the first.
        second: Name of the second.
        rows: One for each parameter that one of them changes.
        requests_first: Ids of the requests that only the first edit answers.
        requests_second: Ids of the requests that only the second edit answers.
        requests_both: Ids of the requests that both answer.
        notes: What is to be said besides.
        entries: One for each entry of a memory that one of them adds, replaces or removes.
    """

    first: str
    second: str
    rows: tuple[ParameterRow, ...] = ()
    requests_first: tuple[str, ...] = ()
    requests_second: tuple[str, ...] = ()
    requests_both: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    entries: tuple[EntryRow, ...] = ()


@dataclass(frozen=True)
class Offer:
    """One thing that can be named in a configuration or on the command line.

    Args:
        kind: What it is one of.
        name: By which it is named.
        summary: One line on it.
        paper: Address of the paper that describes it.
    """

    kind: OfferKind
    name: str
    summary: str
    paper: str = ""


@dataclass(frozen=True)
class SavedEdit:
    """One saved edit.

    Args:
        path: Its folder.
        method: Name of the editor that made it.
        base: The model it belongs to.
        requests: Id of each request that it answers -> the request in words, where the edit keeps
            them, its memory, or the run that made it.
        norm: ‖Δ‖ (Frobenius).
        parameters: Names of the parameters that it changes.
        date: ISO date of the run, or else of the edit or its file.
        problem: Why the edit cannot be read; empty where it can.
        memory: Kind of the memory that it changes, such as ``Codebook``; empty for one of weights.
        entries: Ids of the memory's entries that it adds, replaces or removes.
    """

    path: Path
    method: str = ""
    base: str = ""
    requests: Mapping[str, str] = field(default_factory=dict)
    norm: float | None = None
    parameters: tuple[str, ...] = ()
    date: str = ""
    problem: str = ""
    memory: str = ""
    entries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Patch:
    """One version of a set of edits for a running server.

    Args:
        number: From 1 upwards.
        name: Of the adapter on the server.
        share: Of the traffic; 0 where it is not live.
        sha256: Over the files in its folder.
        rank: Of the adapter; 0 for a whole model.
        relative_error: Share of the edits' norm that the adapter leaves out.
        edits: Folders of the saved edits that are in it.
        created: ISO date.
    """

    number: int
    name: str
    share: float
    sha256: str
    rank: int
    relative_error: float
    edits: tuple[str, ...]
    created: str


@dataclass(frozen=True)
class ServedPatches:
    """The versions of a set of edits, and which of them are live.

    Args:
        title: What was done.
        patches: One for each version.
        notes: What is to be said besides.
    """

    title: str
    patches: tuple[Patch, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServedName:
    """One thing that a running server answers with.

    Args:
        name: By which requests ask for it.
        path: Where the server read it.
        scale: How much of it requests get that name none; None where they get none of it.
        kind: ``base`` or ``adapter``.
    """

    name: str
    path: str
    scale: float | None
    kind: Literal["base", "adapter"]


@dataclass(frozen=True)
class ServerContents:
    """What a running server answers with.

    Args:
        names: One for each thing.
    """

    names: tuple[ServedName, ...] = ()


@dataclass(frozen=True)
class SurvivedEdit:
    """What quantising an edited model makes of one edit.

    Args:
        id: Of the request.
        form: The format.
        outcome: ``held``, ``lost``, or ``not taken`` where the edited model itself does not say it.
        before: Probability of the new answer in the edited model.
        after: The same once that is quantised.
    """

    id: str
    form: str
    outcome: Literal["held", "lost", "not taken"]
    before: float
    after: float


@dataclass(frozen=True)
class Survived:
    """Which edits hold once the edited model is quantised.

    Args:
        edit: Folder of the saved edit.
        rows: One for each format and request.
    """

    edit: str
    rows: tuple[SurvivedEdit, ...]
