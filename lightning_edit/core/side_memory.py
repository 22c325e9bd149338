# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A memory beside a model's weights: rows of tensors that hooks read while the model runs."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.entry_views import EntryViews, Held, ViewState
from lightning_edit.core.errors import ArtifactError, EditError
from lightning_edit.core.memory_entry import (
    MemoryEntry,
    MemoryRecord,
    entries_by_request,
    read_description,
    rows_fit,
    stacked_rows,
    written_description,
)
from lightning_edit.core.wrappers import check_not_compiled, unwrapped

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["MEMORY_PREFIX", "EditMemory", "MemoryEntry", "MemoryRecord"]

_ATTRIBUTE = "edit_memory"
#: What the names of a memory's tensors in its model's state begin with.
MEMORY_PREFIX = f"{_ATTRIBUTE}."


class Routes(Protocol):
    """What decides once for each prompt who answers it."""

    def kept(self, cache: Cache) -> Tensor | None:
        """What was decided for the rows whose keys and values a cache holds, [B] or None."""
        ...

    def keep(self, cache: Cache, route: Tensor) -> None:
        """Gives a cache what was decided for its rows, [B]."""
        ...

    def asked_after(self, lengths: Tensor) -> AbstractContextManager[None]:
        """Context manager: rows begin with prompts of so many tokens, [B]."""
        ...


class MemoryNetworks(Protocol):
    """Networks that all entries of a memory rely on, made for the model that it belongs to."""

    def prepare(self, model: nn.Module) -> None:
        """Makes the networks for a model, which stays as it is."""
        ...

    def shared(self) -> dict[str, Tensor]:
        """What was trained, and what else the settings do not tell."""
        ...

    def take_shared(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what ``shared`` gave elsewhere."""
        ...

    def load(self, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        """Takes over networks out of a model's state, with the settings that came with them."""
        ...


class EditMemory(nn.Module, ABC):
    """Entries that a model consults while it runs, attached to it by hooks.

    The memory is a submodule of the model, ``edit_memory``, so that it moves with it, and its
    state is part of the ``state_dict``: a buffer of one row an entry for each of ``fields``,
    and the texts as extra state. It has hooks in the model only while it holds entries: with an
    empty memory the model is the base itself.

    A subclass names its fields and writes ``hook``. What it is built from, it hands to this
    constructor, so that a saved memory can be built again.

    Args:
        settings: Arguments of the subclass, as JSON types.
    """

    #: Names of the buffers that hold a row of each entry.
    fields: ClassVar[tuple[str, ...]] = ()
    #: All kinds of memories by name.
    kinds: ClassVar[dict[str, type[EditMemory]]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.fields:  # a base of several kinds has none of its own
            EditMemory.kinds[cls.__name__] = cls

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.settings: dict[str, Any] = settings
        for name in self.fields:
            self.register_buffer(name, torch.zeros(0))
        #: Whether the memory came with an edit and goes with the last of its entries.
        self.is_temporary = False
        self._records: dict[str, MemoryEntry] = {}  # without tensors
        self._views = EntryViews()
        # Names of the entries of each request, and the records that they were found in.
        self._index: dict[str, list[str]] = {}
        self._indexed: dict[str, MemoryEntry] = self._records
        self._handles: list[RemovableHandle] = []
        self._stale: frozenset[int] = frozenset()  # numbers of hooks that a copy came with
        self._model: weakref.ref[nn.Module] | None = None
        self._is_off = False
        #: Decides once for each prompt who answers it; None where every token is looked up.
        self.router: Routes | None = None
        #: Networks that all entries rely on; None where there are none.
        self.networks: MemoryNetworks | None = None

    @abstractmethod
    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        """Puts hooks into a model. They must let pass what they get while ``is_off``."""

    def narrowed(self, entry: MemoryEntry) -> MemoryEntry:
        """An entry that has just lost some of its requests and answers others still.

        Args:
            entry: The entry, with the requests that are left.

        Raises:
            EditError: If what the entry holds is of all its requests together.
        """
        return entry

    def derive(self) -> None:
        """Makes anew what is derived from the entries, which have changed; nothing by default."""

    def shared(self) -> dict[str, Tensor]:
        """What all entries rely on and settings do not tell, such as trained networks."""
        return {} if self.networks is None else self.networks.shared()

    def take_shared(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what ``shared`` gave elsewhere, once the memory belongs to a model.

        Raises:
            ArtifactError: If it does not belong to these settings.
        """
        if self.networks is not None:
            self.networks.take_shared(tensors)

    def rewrite(self, prompts: Sequence[str], tokens: PromptTokenizer) -> list[str]:
        """What the model is asked in place of some prompts: the same, unless edits are prompts.

        Args:
            prompts: Texts to continue or questions to answer.
            tokens: The model's tokenizer.
        """
        return list(prompts)

    def route_of(self, cache: Cache) -> Tensor | None:
        """What was decided for the rows whose keys and values a cache holds, [B] or None."""
        return None if self.router is None else self.router.kept(cache)

    @contextmanager
    def prompts_of(self, lengths: Sequence[int] | Tensor) -> Iterator[None]:
        """Context manager: the rows that a model is given begin with prompts of so many tokens.

        A memory decides at the end of a prompt whether it answers. What generates gives it
        prompts, while rows of prompts and answers in one, as likelihoods are computed from, need
        their ends told: by this, or by ``labels`` that are -100 on the prompts. Memories that look
        at every token need none and pass this over.

        Args:
            lengths: Tokens of each row's prompt, without padding, [B].

        Raises:
            EditError: From the model's pass, if it has other rows than these.
        """
        if self.router is None:
            yield
            return
        with self.router.asked_after(torch.as_tensor(lengths)):
            yield

    def keep_route(self, cache: Cache, route: Tensor) -> None:
        """Gives a cache that was filled by hand what was decided for its rows, [B]."""
        if self.router is not None:
            self.router.keep(cache, route)

    # -- entries -----------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._records)

    @property
    def entries(self) -> dict[str, MemoryEntry]:
        """All entries by id, in order; their tensors are views of the buffers."""
        return dict(self._viewing())

    @property
    def state(self) -> object:
        """Another object whenever the memory holds something else."""
        return self._records

    def _viewing(self) -> dict[str, MemoryEntry]:
        return self._views.of(self._held())

    def changed(self, entries: Mapping[str, MemoryEntry]) -> dict[str, MemoryEntry] | None:
        """Those of some entries that would take the place of others, or come after all.

        Args:
            entries: Entries by id, in order.

        Returns:
            These, by id; None where an entry would be gone or stand elsewhere.
        """
        self._viewing()
        return self._views.changed(entries)

    @property
    def requests(self) -> dict[str, MemoryRecord]:
        """What is remembered, by the id of its request: the entries, and what is kept of it."""
        return {
            request: {"entries": names, **self._records[names[0]].requests[request]}
            for request, names in self._names().items()
        }

    @property
    def request_ids(self) -> KeysView[str]:
        """Ids of the requests that are remembered."""
        return self._names().keys()

    def _names(self) -> dict[str, list[str]]:
        """Names of the entries of each request."""
        if self._indexed is not self._records:
            self._index = entries_by_request(self._records)
            self._indexed = self._records
        return self._index

    def check_ids(self, request_ids: Sequence[str]) -> None:
        """Checks that requests are remembered.

        Args:
            request_ids: Their ids.

        Raises:
            EditError: If the memory holds nothing of one of them.
        """
        known = self.request_ids
        unknown = [name for name in request_ids if name not in known]
        if unknown:
            names = ", ".join(list(known)[:5]) or "nothing"
            more = ", …" if len(known) > 5 else ""
            raise EditError(
                f"The memory holds no edit with the id {unknown[0]!r}. It holds {names}{more}; "
                "`memory.requests` lists all."
            )

    def without(self, request_ids: Sequence[str]) -> dict[str, MemoryEntry]:
        """The entries that are left when requests are forgotten.

        Args:
            request_ids: Ids of requests; the memory itself stays as it is.

        Raises:
            EditError: If the memory holds nothing of one of them.
        """
        self.check_ids(request_ids)
        left, names = self.entries, self._names()
        for name in dict.fromkeys(name for request in request_ids for name in names[request]):
            entry = left[name]
            others = {r: kept for r, kept in entry.requests.items() if r not in request_ids}
            if others:
                left[name] = self.narrowed(replace(entry, requests=others))
            else:
                del left[name]
        return left

    def rows(self, field: str, entries: Mapping[str, MemoryEntry]) -> Tensor:
        """What entries have in one field, [N, …], on the model's device.

        Args:
            field: The field.
            entries: Entries by id; those that are held already are not put together anew.
        """
        changed = self._changed_rows(entries)
        if changed is None:
            return self._gathered(entries)[field]
        return self._views.rows_with([field], changed, grows=False)[field]

    def write(self, entries: Mapping[str, MemoryEntry]) -> None:
        """Sets what the memory holds.

        Args:
            entries: All entries by id, in order.
        """
        changed = self._changed_rows(entries)
        before, views = self._held(), self._views.state
        if changed is None:
            rows = self._gathered(entries)
            records = {
                name: before[1][name]
                if entry is views.entries.get(name)
                else replace(entry, tensors={})
                for name, entry in entries.items()
            }
            index = entries_by_request(records)
        else:  # an edit changes few of many
            rows = self._views.rows_with(self.fields, changed, grows=True)
            records = {**before[1], **{n: replace(e, tensors={}) for n, e in changed.items()}}
            index = self._names_with(changed)
        try:
            self._index, self._indexed = index, records
            self._set((rows, records))
            if changed is not None:
                self._views.go_on((rows, records), changed)
        except BaseException:  # an interruption, too, leaves what it held
            self._put_back([(before, views)])
            raise

    def _changed_rows(self, entries: Mapping[str, MemoryEntry]) -> dict[str, MemoryEntry] | None:
        """What ``changed`` gives; None, too, where that has no place among the rows there are."""
        changed = self.changed(entries)
        fits = changed is not None and len(self) and rows_fit(self._held()[0], changed.values())
        return changed if fits else None

    def _names_with(self, changed: Mapping[str, MemoryEntry]) -> dict[str, list[str]]:
        """Names of the entries of each request once some entries are others, or come last."""
        index = dict(self._names())
        for name, entry in changed.items():
            known = self._records[name].requests if name in self._records else {}
            for request in [one for one in known if one not in entry.requests]:
                index[request] = [one for one in index[request] if one != name]
                if not index[request]:
                    del index[request]
            for request in [one for one in entry.requests if one not in known]:
                index[request] = self._views.sorted([*index.get(request, ()), name])
        return index

    def _gathered(self, entries: Mapping[str, MemoryEntry]) -> dict[str, Tensor]:
        """Rows of entries, of which those that are held already are copied at once."""
        held, device = self._held()[0], self._device()
        if not entries:
            return {name: torch.zeros(0, device=device) for name in self.fields}
        numbers = {id(entry): i for i, entry in enumerate(self._viewing().values())}
        found = [numbers.get(id(entry), -1) for entry in entries.values()]
        new = [entry for entry, number in zip(entries.values(), found, strict=True) if number < 0]
        if len(new) == len(entries) or not rows_fit(held, new):
            return stacked_rows(self.fields, list(entries.values()), device)
        source = torch.tensor(found, device=device)
        rows = {name: held[name].to(device)[source.clamp_min(0)] for name in self.fields}
        for name, tensor in stacked_rows(self.fields, new, device).items() if new else ():
            rows[name][source < 0] = tensor
        return rows

    def _held(self) -> Held:
        return {name: self.get_buffer(name) for name in self.fields}, self._records

    def _set(self, held: Held) -> None:
        rows, self._records = held
        for name, tensor in rows.items():
            setattr(self, name, tensor)
        self._settle()

    @contextmanager
    def kept(self, *, always: bool = True) -> Iterator[None]:
        """Context manager: the memory holds after it what it held before, or only if it fails."""
        self._viewing()
        left = [(self._held(), self._views.state)]
        try:
            try:
                yield
                if not always:
                    left.clear()
            finally:
                self._put_back(left)
        finally:
            self._put_back(left)  # if the first time was interrupted

    def _put_back(self, left: list[tuple[Held, ViewState]]) -> None:
        if left:
            held, views = left[0]
            self._views.put_back(views)
            self._set(held)
            left.clear()

    def _device(self) -> torch.device:
        model = self._model() if self._model is not None else None
        parameter = next(model.parameters(), None) if model is not None else None
        return torch.device("cpu") if parameter is None else parameter.device

    # -- a model -----------------------------------------------------------------------------

    @staticmethod
    def find(model: nn.Module) -> EditMemory | None:
        """The memory that is attached to a model."""
        found = getattr(model, _ATTRIBUTE, None)
        if not isinstance(found, EditMemory):
            return None
        if found._model is None:  # copied with its model
            found._move_in(model)
        return found

    def attach_(self, model: nn.Module) -> Self:
        """Makes this the memory of a model, in place of one that holds nothing.

        Raises:
            EditError: If the model has another memory, with entries.
            ModelError: If it is compiled, so that it would not look into the memory.
        """
        check_not_compiled(model)
        model = unwrapped(model)
        if self.networks is not None:
            self.networks.prepare(model)  # before anything is touched, since it may fail
        found = EditMemory.find(model)
        if found is not None and found is not self:
            if not len(found):
                found.detach_()
                return self.attach_(model)
            raise EditError(
                f"The model has a memory already ({type(found).__name__} with {len(found)} "
                "entries), and can have but one. Take it off with "
                "`EditMemory.find(model).detach_()`, or load the model again."
            )
        self._model = weakref.ref(model)
        try:
            model.add_module(_ATTRIBUTE, self)
            self.to(self._device())
            self._settle()
        except BaseException:  # an interruption, too
            if found is None:
                self.detach_()
            raise
        return self

    def detach_(self) -> None:
        """Takes the memory off its model, which is then the base again."""
        model = self._model() if self._model is not None else None
        self._unhook()
        if model is not None and getattr(model, _ATTRIBUTE, None) is self:
            delattr(model, _ATTRIBUTE)
        self._model = None

    @property
    def is_off(self) -> bool:
        """Whether the model runs as if there were no memory."""
        return self._is_off

    @property
    def is_hooked(self) -> bool:
        """Whether the model's passes go through the memory."""
        return len(self._handles) > 1

    @contextmanager
    def off(self) -> Iterator[None]:
        """Has the base model inside a ``with`` block."""
        before, self._is_off = self._is_off, True
        try:
            yield
        finally:
            self._is_off = before

    def _settle(self) -> None:
        """Has hooks in the model if there is anything to look up."""
        self.derive()
        model = self._model() if self._model is not None else None
        if len(self) and not self._handles and model is not None:
            begun = RemovableHandle.next_id
            try:
                # First, since it must run before the others of the model itself.
                first = model.register_forward_pre_hook(_find_before_a_pass)
                self._handles = [first, *self.hook(model)]
            except BaseException:  # an interrupt may come before a handle has been kept
                _remove_hooks(model, lambda number: number >= begun)
                self._handles = []
                raise
        elif not len(self):
            self._unhook()

    def _unhook(self) -> None:
        handles = self._handles
        try:
            for handle in handles:
                handle.remove()
            self._handles = []
        except BaseException:  # an interruption, too, leaves none or all of them
            for handle in handles:
                handle.remove()
            self._handles = []
            raise

    def _move_in(self, model: nn.Module) -> None:
        """Takes the place of the memory of which it is a copy, in a copy of the model.

        Hooks are functions, which a deep copy shares with what it is a copy of: those that came
        with it look into the other memory.
        """
        stale = self._stale
        _remove_hooks(model, lambda number: number in stale)
        self._stale = frozenset()
        self._model = weakref.ref(model)
        self._settle()

    # -- state -------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, object]:
        stale = frozenset(handle.id for handle in self._handles) | self._stale
        made: dict[str, object] = {"_views": EntryViews(), "_handles": [], "_model": None}
        return {**self.__dict__, **made, "_stale": stale}

    @override
    def get_extra_state(self) -> Tensor:
        """Settings and texts, as JSON in bytes: a tensor goes into any file."""
        return written_description({"kind": type(self).__name__, **self.description()})

    @override
    def set_extra_state(self, state: Tensor) -> None:
        found = read_description(state)
        self.check_kind(found["kind"], found["settings"])
        self._records = {
            e["id"]: MemoryEntry({}, e["requests"], e["notes"]) for e in found["entries"]
        }

    def description(self) -> dict[str, object]:
        """Settings and texts, as JSON types."""
        return {
            "settings": self.settings,
            "entries": [
                {"id": name, "requests": dict(e.requests), "notes": dict(e.notes)}
                for name, e in self._records.items()
            ],
        }

    def is_of(self, kind: str, settings: Mapping[str, object]) -> bool:
        """Whether entries of a memory of some kind and settings belong into this one."""
        return (kind, dict(settings)) == (type(self).__name__, self.settings)

    def check_kind(self, kind: str, settings: Mapping[str, object]) -> None:
        """Checks that entries of another memory belong into this one.

        Raises:
            ArtifactError: If they do not.
        """
        if not self.is_of(kind, settings):
            raise ArtifactError(
                f"These entries belong to a {kind} with {dict(settings)}, but the model has a "
                f"{type(self).__name__} with {self.settings}. Take that off with "
                "`EditMemory.find(model).detach_()`, or use the settings that the entries were "
                "made with."
            )

    @override
    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: object, **kwargs: object
    ) -> None:
        own = f"{prefix}network."
        shared = {n.removeprefix(own): t for n, t in state_dict.items() if n.startswith(own)}
        state_dict = {n: t for n, t in state_dict.items() if not n.startswith(own)}
        extra = state_dict.get(f"{prefix}_extra_state")
        if extra is not None and self.networks is not None:
            settings = read_description(extra)["settings"]
            self.networks.load(settings, shared)
        if extra is not None:
            for name in self.fields:  # as many rows as the state has
                if (tensor := state_dict.get(f"{prefix}{name}")) is not None:
                    setattr(self, name, torch.empty_like(tensor, device=self._device()))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._settle()


def _remove_hooks(model: nn.Module, is_one: Callable[[int], bool]) -> None:
    """Takes hooks out of a model by their numbers."""
    for module in model.modules():
        for table in (
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks,
            module._forward_pre_hooks_with_kwargs,
        ):
            for number in [number for number in table if is_one(number)]:
                del table[number]


def _find_before_a_pass(model: nn.Module, _: tuple[object, ...]) -> None:
    """Hook by which a copied memory moves into its model before the first pass."""
    EditMemory.find(model)
