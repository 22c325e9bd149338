# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Changes of a memory beside a model: entries added, replaced or taken away."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn

from lightning_edit.core.committed import Batches
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.figures import EditDetails
from lightning_edit.core.memory_entry import MemoryEntry, read_description, written_description
from lightning_edit.core.provenance import Provenance
from lightning_edit.core.sharding import everywhere, local_shard, shard_like
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.core.storage import (
    EditAbout,
    EditConfig,
    EntryRecord,
    provenance_of,
    save_artifact,
)

__all__ = ["MemoryWrite", "memory_of", "with_entries"]


class MemoryWrite(Edit):
    """What an edit writes into the memory of a model, whose weights stay as they are.

    Args:
        kind: Name of the memory's class, such as ``Codebook``.
        settings: What that memory is built from.
        entries: Id to the entry that is added or put in place of the one of this id; None takes
            an entry away.
        provenance: Where the edit comes from.
        replaced: Id to what stood there before, None for nothing; needed to undo an edit that was
            applied elsewhere.
        order: Ids of all entries before the edit, so that undoing it brings back their order.
        shared: What all entries rely on beside the settings, such as trained networks; kept once
            in an edit's files, however many entries there are.

    Examples:
        >>> class Shift(EditMemory):
        ...     fields = ("bias",)
        ...
        ...     def hook(self, model):
        ...         return [model.register_forward_hook(lambda _, __, y: y + self.bias.sum(0))]
        >>> entries = {name: MemoryEntry({"bias": torch.ones(2)}, {name: {}}) for name in "ab"}
        >>> edit = MemoryWrite("Shift", {}, entries)
        >>> edit
        MemoryWrite(Shift: 2 entries)
        >>> model = torch.nn.Linear(2, 2)
        >>> edit.apply_(model)
        >>> list(EditMemory.find(model).requests)
        ['a', 'b']
        >>> MemoryWrite.removing(model, ["a"]).apply_(model)
        >>> list(EditMemory.find(model).requests)
        ['b']
    """

    artifact_kind: ClassVar[str] = "memory_write"
    changes_weights: ClassVar[bool] = False

    def __init__(
        self,
        kind: str,
        settings: Mapping[str, object],
        entries: Mapping[str, MemoryEntry | None],
        provenance: Provenance | None = None,
        replaced: Mapping[str, MemoryEntry | None] | None = None,
        order: Sequence[str] = (),
        shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.kind = kind
        self.settings = dict(settings)
        self.entries: dict[str, MemoryEntry | None] = dict(entries)
        self.provenance = provenance or Provenance()
        self.replaced: dict[str, MemoryEntry | None] = dict(replaced or {})
        self.details: EditDetails = {}
        self.carried: dict[str, Tensor] = {}
        self.batches: Batches = ()
        self.order = tuple(order)
        self.shared: dict[str, Tensor] = dict(shared or {})

    def __repr__(self) -> str:
        return f"MemoryWrite({self.kind}: {len(self)} entries)"

    def __len__(self) -> int:
        return len(self.entries)

    @classmethod
    def between(
        cls,
        memory: EditMemory,
        entries: Mapping[str, MemoryEntry],
        before: Mapping[str, MemoryEntry] | None = None,
    ) -> Self:
        """The edit after which a memory holds these entries.

        Args:
            memory: The memory.
            entries: What it is to hold, by id; new ones last.
            before: What it held, by id; what it holds now if None.
        """
        others = memory.changed(entries) if before is None else None
        before = memory.entries if before is None else before
        changed: dict[str, MemoryEntry | None] = {}
        if others is None:
            changed = dict.fromkeys(name for name in before if name not in entries)
            others = {n: e for n, e in entries.items() if e is not before.get(n)}
        changed |= {n: e for n, e in others.items() if not e.equals(before.get(n))}
        return cls(
            type(memory).__name__,
            memory.settings,
            changed,
            replaced={name: before.get(name) for name in changed},
            order=tuple(before),
            shared=memory.shared(),
        )

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The edit that brings an empty memory to what a model's memory holds.

        Args:
            model: A model with a memory.

        Raises:
            ArtifactError: If it has none.
        """
        memory = memory_of(model)
        entries = memory.entries
        return cls(
            type(memory).__name__,
            memory.settings,
            entries,
            replaced=dict.fromkeys(entries),
            shared=memory.shared(),
        )

    @classmethod
    def removing(cls, model: nn.Module, request_ids: Sequence[str]) -> Self:
        """The edit after which a model's memory has forgotten requests.

        Args:
            model: A model with a memory.
            request_ids: Ids of the requests.

        Raises:
            EditError: If the memory holds nothing of one of them.
            ArtifactError: If the model has no memory.
        """
        memory = memory_of(model)
        edit = cls.between(memory, memory.without(request_ids))
        edit.provenance = Provenance(request_ids=tuple(request_ids))
        return edit

    def __add__(self, other: Self) -> Self:
        entries = dict(self.entries)
        for name, entry in other.entries.items():
            if entries.get(name) is None:
                entries.pop(name, None)  # what was taken away comes back as the last
            entries[name] = entry
        provenance = self.provenance.and_then(other.provenance)
        replaced = {**other.replaced, **self.replaced}
        shared = {**self.shared, **other.shared}
        total = type(self)(
            self.kind, self.settings, entries, provenance, replaced, self.order, shared
        )
        total.carried = {**self.carried, **other.carried}
        total.batches = (*self.parts, *other.parts)
        return total

    def norm(self) -> float:
        """Frobenius norm over the tensors of all entries."""
        tensors = [t for entry in self._present() for t in entry.tensors.values()]
        return math.hypot(*(float(torch.linalg.vector_norm(t.double())) for t in tensors))

    @property
    def nbytes(self) -> int:
        """Bytes of the entries' tensors, without what all of them share."""
        return sum(t.nbytes for entry in self._present() for t in entry.tensors.values())

    @property
    def keeps_originals(self) -> bool:
        """Whether it knows the entries that it replaces, or that there were none."""
        return self.entries.keys() <= self.replaced.keys()

    def _present(self) -> list[MemoryEntry]:
        return [entry for entry in self.entries.values() if entry is not None]

    # -- on a model ------------------------------------------------------------------------

    def apply_(self, model: nn.Module, *, check: bool = True) -> None:
        """Writes the entries into the model's memory; a model without one gets it.

        Args:
            model: The model.
            check: Compare its weights with the recorded base, whose hidden states the entries
                are about.

        Raises:
            ArtifactError: If the model is not the recorded base, has a memory of another kind, or
                lacks an entry that is to be taken away. Nothing has been written then.
        """
        self.check_finite()
        if check:
            self.check_base(model)
        found = EditMemory.find(model)
        if found is not None and not len(found) and not found.is_of(self.kind, self.settings):
            found = None  # of an editor that has made no edit: this one's takes its place
        memory = self.build() if found is None else found
        memory.check_kind(self.kind, self.settings)
        before = memory.entries
        missing = [n for n, entry in self.entries.items() if entry is None and n not in before]
        if missing:
            raise ArtifactError(
                f"The edit takes away {missing[0]!r}, which this memory does not hold: it was "
                "made for another one, or has been applied already."
            )
        after = {n: e for n, e in {**before, **self.entries}.items() if e is not None}
        known = self.replaced, self.order
        try:
            if found is None:
                memory.is_temporary = True
                memory.attach_(model)
                memory.take_shared(self.shared)
            memory.write(after)
            self.replaced = {name: before.get(name) for name in self.entries}
            self.order = tuple(before)
        except BaseException:  # an interruption, too, leaves the model as it was
            self.replaced, self.order = known
            if found is None:
                memory.detach_()
            else:
                memory.write(before)
            raise

    def revert_(self, model: nn.Module) -> None:
        """Puts the memory back, bit for bit and in its order.

        Raises:
            ArtifactError: If the memory does not hold what this edit wrote, or what it replaced is
                not known. Nothing has been written then.
        """
        memory = memory_of(model)
        memory.check_kind(self.kind, self.settings)
        now = memory.entries
        missing = [name for name in self.entries if name not in self.replaced]
        if missing:
            raise ArtifactError(
                f"What stood in place of {missing[0]!r} was not kept, so the edit cannot be undone "
                "exactly. Save edits with their originals (`save(folder, originals=True)`)."
            )
        for name, entry in self.entries.items():
            found = now.get(name)
            if found is None if entry is None else entry.equals(found):
                continue
            raise ArtifactError(
                f"The entry {name!r} of this memory is not what this edit wrote: the edit is not "
                "applied here, or another change came after it. Undo later edits first."
            )
        back = {**now, **self.replaced}
        # What came later stands behind what was there before.
        order = dict.fromkeys((*self.order, *now, *self.replaced))
        left = {name: e for name in order if (e := back.get(name)) is not None}
        try:
            memory.write(left)
            if memory.is_temporary and not len(memory):
                memory.detach_()
        except BaseException:  # an interruption, too, leaves the edit where it was
            if EditMemory.find(model) is None:
                memory.attach_(model)
            memory.write(now)
            raise

    @contextmanager
    def kept(self, model: nn.Module, *, always: bool = True) -> Iterator[None]:
        """Context manager: puts the memory back after it, with its entries, or takes it off."""
        before = EditMemory.find(model)
        is_kept = True

        def put_back() -> None:
            if not is_kept:
                return
            now = EditMemory.find(model)
            if now is not None and now is not before:
                now.detach_()
            if before is not None and now is not before:
                before.attach_(model)

        with nullcontext() if before is None else before.kept(always=always):
            try:
                try:
                    yield
                    is_kept = always
                finally:
                    put_back()
            finally:
                put_back()  # if the first time was interrupted

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the entries that the edit adds or puts in place of others."""
        for name, entry in self.entries.items():
            for field, tensor in (entry.tensors if entry is not None else {}).items():
                yield f"{name}.{field}", tensor

    def check_targets(self, model: nn.Module, originals: Mapping[str, Tensor]) -> None:
        """Checks that the model has the memory that the entries belong to.

        Raises:
            ArtifactError: If it has none, or another.
        """
        memory_of(model).check_kind(self.kind, self.settings)

    def write_(self, model: nn.Module, originals: Mapping[str, Tensor]) -> None:
        """Has the model's memory hold the entries of this edit and no others."""
        entries = self.entries
        if not all(entries.values()):  # some are None
            entries = {n: e for n, e in entries.items() if e is not None}
        memory_of(model).write(cast("dict[str, MemoryEntry]", entries))

    reset_ = write_

    def made(self, name: str, tensor: Tensor, original: Tensor) -> bool:
        """Whether a parameter is its original: a memory changes none."""
        same = torch.equal(local_shard(tensor), shard_like(tensor, original))
        return everywhere(tensor, same)

    def seal(self, model: nn.Module, originals: Mapping[str, Tensor]) -> Self:
        """The edit that brings an empty memory to what the model's memory holds."""
        return type(self).of(model)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: the memory is part of the model's state."""
        return {}

    def recorded(self) -> tuple[dict[str, Tensor], list[EntryRecord]]:
        """A row of each field for each entry that is not taken away, and all entries."""
        return _stacked(self.entries), _records(self.entries)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], model: nn.Module) -> Self:
        """The edit that brings an empty memory to what the model's memory holds."""
        return cls.of(model)

    def build(self) -> EditMemory:
        """An empty memory of the kind and the settings that the entries belong to.

        Raises:
            ArtifactError: If that kind is not known.
        """
        kind = EditMemory.kinds.get(self.kind)
        if kind is None:
            raise ArtifactError(
                f"The edit belongs to a memory of the kind {self.kind!r}, which is not known. "
                "Import the package that defines it, or upgrade lightning_edit."
            )
        try:
            return kind(**self.settings)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise ArtifactError(
                f"A {self.kind} cannot be built from the settings {self.settings!r:.200} of the "
                f"edit: {error}. Make the edit again."
            ) from error

    # -- files -----------------------------------------------------------------------------

    def save(self, folder: str | Path, *, originals: bool = True) -> Path:
        """Writes ``delta_config.json``, ``delta.safetensors`` and ``README.md``.

        Args:
            folder: Created if need be; files of an earlier edit in it are replaced.
            originals: Keep the entries that the edit replaces with it, so that it can be undone in
                a memory that holds it.

        Returns:
            The folder.
        """
        sides = {"entries": self.entries, "replaced": self.replaced if originals else {}}
        shared = self.shared if self._present() else {}  # what is taken away needs none
        tensors: dict[str, Tensor] = {f"shared.{n}": t for n, t in shared.items()}
        for side, entries in sides.items():
            tensors |= {f"{side}.{field}": rows for field, rows in _stacked(entries).items()}
        is_needed = originals and any(entry is not None for entry in self.replaced.values())
        about: EditAbout = {
            "parameters": {},
            "memory": {"kind": self.kind, "settings": self.settings},
            "entries": _records(sides["entries"]),
            "replaced": _records(sides["replaced"]),
            "order": list(self.order) if is_needed else [],
        }
        return save_artifact(self, Path(folder), tensors, about)

    @classmethod
    def from_files(cls, folder: Path, config: EditConfig, tensors: Mapping[str, Tensor]) -> Self:
        """The entries, with those that they replaced where they were saved.

        Raises:
            ArtifactError: If description and tensors do not belong together.
        """
        try:
            entries = _entries(config["entries"], "entries", tensors)
            replaced = _entries(config["replaced"], "replaced", tensors)
            memory = config["memory"]
            return cls(
                str(memory["kind"]),
                dict(memory["settings"]),
                entries,
                provenance_of(config),
                replaced,
                [str(name) for name in config["order"]],
                _named(tensors, "shared"),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"`{folder}` is damaged ({error!r}): its description and its tensors do not "
                "belong together. Restore it from a backup, or make the edit again."
            ) from None


def with_entries(
    state: Mapping[str, Tensor], changes: Iterable[tuple[Mapping[str, Tensor], list[EntryRecord]]]
) -> dict[str, Tensor]:
    """What the state of a memory comes to with later edits of it.

    Args:
        state: State of a memory, by the names that it has in the memory.
        changes: What ``recorded`` gave of the edits, in order.
    """
    about = read_description(state["_extra_state"])
    fields = [name for name in state if name in EditMemory.kinds[about["kind"]].fields]
    rows = [{name: state[name][i] for name in fields} for i in range(len(about["entries"]))]
    held = {e["id"]: (e, row) for e, row in zip(about["entries"], rows, strict=True)}
    for tensors, records in changes:
        for name, entry in _entries(records, "", {f".{n}": t for n, t in tensors.items()}).items():
            if entry is None:
                held.pop(name, None)
            else:
                held[name] = _records({name: entry})[0], dict(entry.tensors)
    about["entries"] = [record for record, _ in held.values()]
    grown = {f: torch.stack([row[f] for _, row in held.values()]) for f in fields if held}
    empty = {f: torch.zeros(0) for f in fields}
    return {**state, **empty, **grown, "_extra_state": written_description(about)}


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors whose names begin so, by the rest of their names."""
    return {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{prefix}.")}


def _stacked(entries: Mapping[str, MemoryEntry | None]) -> dict[str, Tensor]:
    """A row of each field for each entry that is there, on the CPU."""
    present = [entry for entry in entries.values() if entry is not None]
    fields = present[0].tensors if present else ()
    return {f: torch.stack([entry.tensors[f].detach().cpu() for entry in present]) for f in fields}


def _records(entries: Mapping[str, MemoryEntry | None]) -> list[EntryRecord]:
    return [
        {"id": name, "requests": dict(e.requests), "notes": dict(e.notes)}
        if e is not None
        else {"id": name}
        for name, e in entries.items()
    ]


def _entries(
    records: Sequence[EntryRecord], side: str, tensors: Mapping[str, Tensor]
) -> dict[str, MemoryEntry | None]:
    own = _named(tensors, side)
    found: dict[str, MemoryEntry | None] = {}
    row = 0
    for record in records:
        if "requests" not in record:
            found[str(record["id"])] = None
            continue
        rows = {name: tensor[row] for name, tensor in own.items()}
        found[str(record["id"])] = MemoryEntry(rows, record["requests"], record["notes"])
        row += 1
    if any(len(tensor) != row for tensor in own.values()):
        raise ValueError(f"{row} {side}, but other numbers of rows")
    return found


def memory_of(model: nn.Module) -> EditMemory:
    """The memory of a model.

    Args:
        model: The model.

    Raises:
        ArtifactError: If it has none.
    """
    found = EditMemory.find(model)
    if found is None:
        raise ArtifactError(
            f"This {type(model).__name__} has no memory: the edit is not applied here. Apply it "
            "with `edit.apply_(model)`."
        )
    return found
