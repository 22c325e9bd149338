# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What editors have in common that leave the weights alone and remember edits beside them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from lightning_edit.core.errors import EditError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.side_memory import EditMemory, MemoryEntry
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.targets import MemoryTarget, Target

__all__ = ["MemoryModule"]


class MemoryModule(EditModule[MemoryWrite]):
    """Base of editors that remember: their edits are entries of a memory beside the weights.

    A subclass writes ``build_memory``, and ``compute_edit``, which begins from
    ``entries_without`` the requests of its batch, so that a request whose id is remembered
    already takes the place of the earlier one, and ends with ``memory_write``.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. The method's default when None.
        max_entries: Entries that the memory may hold; any number if None.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].
    """

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        max_entries: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        if max_entries is not None and max_entries < 1:
            raise ValueError(
                f"`max_entries` is expected to be at least 1, or None for no bound, but got "
                f"{max_entries}."
            )
        self.max_entries = max_entries

    # -- the method --------------------------------------------------------------------------

    @abstractmethod
    def build_memory(self, tree: ModelTree) -> EditMemory:
        """Builds an empty memory for a model.

        Raises:
            EditError: If the model has no place for it.
        """

    def entries_without(self, request_ids: Sequence[str]) -> dict[str, MemoryEntry]:
        """What the memory holds beside what it holds of some requests, which it need not know."""
        known = self.memory.request_ids
        return self.memory.without([name for name in request_ids if name in known])

    def entry_id(self, request_id: str, entries: Mapping[str, object]) -> str:
        """A name for a new entry: that of its request, with a number where it has several."""
        names = (f"{request_id}#{n}" if n else request_id for n in range(len(entries) + 1))
        return next(name for name in names if name not in entries)

    def next_number(self, entries: Mapping[str, MemoryEntry]) -> int:
        """A number for a new entry, where the notes of entries number them."""
        return 1 + max((int(entry.notes["number"]) for entry in entries.values()), default=-1)

    def check_budget(self, entries: Mapping[str, object]) -> None:
        """Checks that the memory may hold so many entries.

        Raises:
            EditError: If it may not.
        """
        if self.max_entries is not None and len(entries) > self.max_entries:
            raise EditError(
                f"The memory holds {len(self.memory)} of `max_entries={self.max_entries}` entries, "
                f"and would hold {len(entries)}. Take edits out of it (`editor.remove([id])`), or "
                "raise `max_entries`."
            )

    def memory_write(self, entries: Mapping[str, MemoryEntry]) -> MemoryWrite:
        """The edit after which the memory holds these entries.

        Raises:
            EditError: If these are too many.
        """
        self.check_budget(entries)
        return MemoryWrite.between(self.memory, entries)

    @override
    def edited_names(self, tree: ModelTree) -> list[str]:
        """None: the weights stay as they are."""
        return []

    @override
    def make_target(self, tree: ModelTree) -> Target[MemoryWrite]:
        return MemoryTarget(tree.model, self.build_memory(tree))
