# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What changed: the interface of every edit, and the door by which saved ones come in."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_edit.core.committed import Batches
from lightning_edit.core.errors import ArtifactError, EditError
from lightning_edit.core.figures import EditDetails
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.provenance import Provenance
from lightning_edit.core.request import EditRequest
from lightning_edit.core.storage import EditConfig, EntryRecord, read_config, read_tensors

__all__ = ["Edit"]

# By name, for what they name imports this file. A memory is known once its room is imported.
_KINDS = {
    "weight_delta": ("lightning_edit.core.delta", "WeightDelta"),
    "memory_write": ("lightning_edit.memories", "MemoryWrite"),
}


class Edit(ABC):
    """A change to a model that can be applied, undone, saved, loaded and added to another.

    There are two kinds: [`WeightDelta`][lightning_edit.WeightDelta] changes weights, and
    [`MemoryWrite`][lightning_edit.MemoryWrite] what a memory beside them holds. Subclasses
    write the abstract methods; ``load``, ``applied`` and ``reverted`` follow from them.

    Examples:
        >>> from lightning_edit import WeightDelta
        >>> folder = getfixture("tmp_path") / "delta"
        >>> _ = WeightDelta({}).save(folder)
        >>> Edit.load(folder)  # of either kind
        WeightDelta()
    """

    #: What the description of a saved edit calls its kind.
    artifact_kind: ClassVar[str]

    #: Whether the model has other weights after the edit.
    changes_weights: ClassVar[bool] = True

    provenance: Provenance
    #: Figures of the computation, such as target values and losses; not saved.
    details: EditDetails
    #: What the method goes on from once this edit is committed, such as running statistics; of a
    #: sum, what its last part left. Kept in checkpoints, not in an edit's files.
    carried: dict[str, Tensor]
    #: What was asked for when the edit was made, which making it again takes; of a sum, of each of
    #: its parts. Kept in checkpoints, not in an edit's files.
    batches: Batches

    @property
    def parts(self) -> Batches:
        """What each part of the edit was made of; one that is not known where nothing is."""
        return self.batches or (None,) * bool(len(self))

    @property
    def answered(self) -> list[EditRequest]:
        """The requests that the edit was made of, but for those that failed."""
        failed = self.details.get("failed", {})
        asked = [request for batch in self.batches if batch for request in batch.requests]
        return [request for request in asked if request.id not in failed]

    def mark_taken_back(self, why: str) -> None:
        """Has the requests of an edit that was taken back as soon as it was made count as failed.

        Args:
            why: What is told of each of them.
        """
        failed = {request.id: why for request in self.answered}
        self.details["failed"] = {**self.details.get("failed", {}), **failed}
        self.details["requests"] = []
        self.details["taken_back"] = why

    @abstractmethod
    def __len__(self) -> int:
        """Number of parameters or memory entries that the edit touches."""

    @abstractmethod
    def __add__(self, other: Self) -> Self:
        """This edit and then the other, as one."""

    @abstractmethod
    def apply_(self, model: nn.Module, *, check: bool = True) -> None:
        """Writes the edit into the model, in place; with ``check``, only into its base."""

    @abstractmethod
    def revert_(self, model: nn.Module) -> None:
        """Takes the edit out of the model again, bit for bit, in place."""

    @abstractmethod
    def norm(self) -> float:
        """Size of the change (Frobenius norm over everything it touches)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the edit itself takes, without the originals kept for undoing."""

    @property
    @abstractmethod
    def keeps_originals(self) -> bool:
        """Whether it knows what it replaces, which undoing it takes."""

    @abstractmethod
    def save(self, folder: str | Path, *, originals: bool = True) -> Path:
        """Writes the edit as a folder and returns its path."""

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads an edit that ``save`` wrote: ``Edit.load`` of either kind, a subclass its own.

        Args:
            folder: A saved edit.

        Raises:
            ArtifactError: If a file is missing, damaged or of a newer format, or the folder holds
                an edit of another kind than that of the class.
        """
        folder = Path(folder)
        config = read_config(folder)
        kind = _kind_in(config, folder)
        if issubclass(cls, kind):
            return cls.from_files(folder, config, read_tensors(folder, config))
        if issubclass(kind, cls):
            return kind.from_files(folder, config, read_tensors(folder, config))
        what, wanted = ("weights" if one.changes_weights else "a memory" for one in (kind, cls))
        raise ArtifactError(
            f"`{folder}` holds an edit of {what}, not of {wanted}. Load it with "
            f"`{kind.__name__}.load`, or whatever it holds with `Edit.load`."
        )

    @classmethod
    @abstractmethod
    def from_files(cls, folder: Path, config: EditConfig, tensors: Mapping[str, Tensor]) -> Self:
        """The edit out of what was read in its folder.

        Raises:
            ArtifactError: If description and tensors do not belong together.
        """

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Context manager: the model with the edit; after it, as it was, whatever happened."""
        with self.kept(model):
            self.apply_(model)
            yield model

    @contextmanager
    def reverted(self, model: nn.Module) -> Iterator[nn.Module]:
        """Context manager: the (edited) model without the edit; after it, as it was."""
        # Other edits may stand beside this one, so the model need not be its base in between.
        with self.kept(model):
            self.revert_(model)
            yield model

    @abstractmethod
    def kept(self, model: nn.Module, *, always: bool = True) -> AbstractContextManager[None]:
        """Context manager: puts what the edit touches back after it, whatever happens in it.

        Args:
            model: The model.
            always: Whether also where nothing fails.
        """

    @abstractmethod
    def values(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors that the edit consists of, by name."""

    def check_finite(self) -> None:
        """Checks that no value of the edit is infinite or no number.

        Raises:
            EditError: If one is.
        """
        for name, tensor in self.values():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise EditError(
                    f"The edit holds values that are not finite in `{name}`, which would destroy "
                    "the model. Nothing was written. Make it anew with smaller steps (`lr`) and "
                    "settings that are finite."
                )

    def check_base(self, model: nn.Module) -> None:
        """Checks that a model has the weights that the edit belongs to, where it records them.

        Raises:
            ArtifactError: If it has others.
        """
        base = self.provenance.base
        if not base.sha256:
            return
        found = weight_hash(model)
        if found == base.sha256:
            return
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        hint = (
            f" The base was loaded as {base.dtype} and this model as {dtype}: load it alike."
            if base.dtype and dtype != base.dtype
            else " Load that model, or pass `check=False` (`--no_check`) to add the change to this "
            "one anyway."
        )
        raise ArtifactError(
            f"The edit belongs to {base.id or 'another model'} with the weight hash "
            f"{base.sha256[:12]}…, but this model has {found[:12]}…: it is another model, or it "
            f"has been edited already.{hint}"
        )

    # -- what an optimizer does with the sum of all edits ------------------------------------

    @abstractmethod
    def check_targets(self, model: nn.Module, originals: Mapping[str, Tensor]) -> None:
        """Checks that the edit touches only what was announced.

        Raises:
            EditError: If it touches anything else.
        """

    @abstractmethod
    def write_(self, model: nn.Module, originals: Mapping[str, Tensor]) -> None:
        """Sets what the edit touches to original + change, without checks."""

    @abstractmethod
    def made(self, name: str, tensor: Tensor, original: Tensor) -> bool:
        """Whether a parameter is what this edit makes of its original, up to rounding."""

    @abstractmethod
    def reset_(self, model: nn.Module, originals: Mapping[str, Tensor]) -> None:
        """Sets all that could have been touched to original + change."""

    @abstractmethod
    def seal(self, model: nn.Module, originals: Mapping[str, Tensor]) -> Self:
        """The edit, which stands in the model, with all that an exact undo elsewhere takes."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold of the edit beside the model's own state."""

    def increment(self) -> dict[str, object]:
        """What a checkpoint has to hold of the edit beside one of all edits before it."""
        tensors, entries = self.recorded()
        return {
            "tensors": tensors,
            "entries": entries,
            "carried": dict(self.carried),
            "request_ids": list(self.provenance.request_ids),
            "batches": [batch and batch.to_dict() for batch in self.parts],
        }

    @abstractmethod
    def recorded(self) -> tuple[dict[str, Tensor], list[EntryRecord]]:
        """Tensors that the edit consists of, and the entries of a memory whose rows they are."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Tensor], model: nn.Module) -> Self:
        """The edit out of ``state_dict`` and a model in which it stands."""


def _kind_in(config: EditConfig, folder: Path) -> type[Edit]:
    """The class of the edit that a folder holds, by its description."""
    name = str(config.get("kind", "weight_delta"))
    if name not in _KINDS:
        raise ArtifactError(
            f"`{folder}` holds an edit of the kind {name!r}, which this version of lightning_edit "
            f"does not know: it knows {' and '.join(_KINDS)}. Upgrade with `pip install -U "
            "lightning-edit`."
        )
    module, cls = _KINDS[name]
    found: type[Edit] = getattr(importlib.import_module(module), cls)
    return found
