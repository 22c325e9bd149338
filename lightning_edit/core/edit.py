# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What changed: the interface of every edit, and where an edit comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["BaseModelInfo", "Edit", "Provenance"]


@dataclass(frozen=True)
class BaseModelInfo:
    """Which weights an edit belongs to.

    Args:
        id: Hub id or folder the model was loaded from.
        revision: Revision of a hub model.
        dtype: Name of the weights' dtype, such as ``float32``.
        sha256: Hash of all weights before the edit, as ``core.hashing.weight_hash`` makes it.
        parameters: Number of parameters.
    """

    id: str = ""
    revision: str | None = None
    dtype: str = ""
    sha256: str = ""
    parameters: int = 0


@dataclass(frozen=True)
class Provenance:
    """Where an edit comes from: written beside it, never read to compute anything.

    Args:
        method: Name of the editor, such as ``ROME``.
        paper: Address of the paper that describes the method.
        settings: The editor's hyper-parameters, as JSON types.
        base: The model that was edited.
        request_ids: Ids of the requests that the edit answers, in order.
    """

    method: str = ""
    paper: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    base: BaseModelInfo = field(default_factory=BaseModelInfo)
    request_ids: tuple[str, ...] = ()


class Edit(ABC):
    """A change to a model that can be applied, undone, saved and loaded.

    Subclasses write :meth:`apply_`, :meth:`revert_`, :meth:`norm`, :attr:`nbytes` and
    :meth:`save`; :meth:`applied` and :meth:`reverted` follow from them.
    """

    provenance: Provenance

    @abstractmethod
    def apply_(self, model: nn.Module) -> None:
        """Writes the edit into the model, in place."""

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

    @abstractmethod
    def save(self, folder: str | Path) -> Path:
        """Writes the edit as a folder and returns its path."""

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Has the edit in the model inside a ``with`` block only."""
        self.apply_(model)
        try:
            yield model
        finally:
            self.revert_(model)

    @contextmanager
    def reverted(self, model: nn.Module) -> Iterator[nn.Module]:
        """Has the edit out of the (edited) model inside a ``with`` block only."""
        self.revert_(model)
        try:
            yield model
        finally:
            self.apply_(model)
