# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What is edited in a model: its weights, or a memory beside them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Generic

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_edit.core.committed import (
    Batches,
    RequestBatch,
    batches_without,
    narrowed,
    requests_of,
)
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import EditError, ModelError
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.provenance import Provenance
from lightning_edit.core.sharding import local_shard, reshard, shard_like
from lightning_edit.core.side_memory import MEMORY_PREFIX, EditMemory, MemoryEntry
from lightning_edit.core.wrappers import check_not_compiled, plain_names
from lightning_edit.optim import E, EditOptimizer

__all__ = ["MemoryTarget", "Target", "WeightTarget", "check_target", "no_new_memory"]


class Target(ABC, Generic[E]):
    """What an editor edits in a model, and all that was committed to it.

    Args:
        model: The model. It is edited in place.
        optimizer: Writes edits, one a step.
    """

    def __init__(self, model: nn.Module, optimizer: EditOptimizer[E]) -> None:
        self.model = model
        self.optimizer = optimizer
        #: Names of the parameters that get gradients while an edit is made, or in ``fit``.
        self.trainable: tuple[str, ...] = ()

    @property
    def originals(self) -> dict[str, Tensor]:
        """What stood in the model before the first edit, by the parameter's name."""
        return self.optimizer.originals

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that edits may change, by name; of a sharded model, in their parts."""
        reshard(self.model)
        return {name: self.model.get_parameter(name) for name in self.originals}

    @property
    @abstractmethod
    def delta(self) -> E:
        """All that was committed so far."""

    def relative_norm(self) -> float:
        """‖Δ‖ / ‖W‖ over the parameters that edits may change; 0 where there are none."""
        size = self.optimizer.norm_of_originals
        return self.delta.norm() / size if size else 0.0

    @property
    @abstractmethod
    def request_ids(self) -> Collection[str]:
        """Ids of the requests that were committed so far."""

    @property
    @abstractmethod
    def memory(self) -> EditMemory:
        """The memory of the model.

        Raises:
            EditError: If weights are edited.
        """

    @abstractmethod
    def made_again(self, request_ids: Sequence[str]) -> list[RequestBatch] | None:
        """The batches that are made again when requests are taken out, in order.

        Args:
            request_ids: Ids of the requests.

        Returns:
            The batches; None where these requests are forgotten and nothing is made again.

        Raises:
            EditError: If one of them is not known, or single requests cannot be taken out.
        """

    @abstractmethod
    def remove(self, request_ids: Sequence[str], again: Callable[[RequestBatch], E]) -> E:
        """Takes requests out of what was committed, and leaves all others in it.

        Args:
            request_ids: Their ids.
            again: Makes the edit of a batch of requests for the model as it stands.

        Returns:
            What has changed in the model.

        Raises:
            EditError: If one of them is not known, or single requests cannot be taken out. The
                model is as it was then, as it is where ``again`` fails.
        """

    def _replay(
        self, batches: Sequence[RequestBatch], again: Callable[[RequestBatch], E], gone: int
    ) -> None:
        """Has the model hold what is made of batches now, and nothing else.

        Args:
            batches: The batches.
            again: Makes the edit of each for the model as it stands.
            gone: Number of requests that are not in them any more, for the log.
        """
        rank_zero_info(
            f"{gone} request(s) are taken out of the model: {len(batches)} edit(s), of "
            f"{sum(len(batch.requests) for batch in batches)} request(s), are made again."
        )
        self.optimizer.rewind()
        for batch in batches:
            self.optimizer.rewind(self.delta + again(batch))

    @abstractmethod
    def committed(self) -> E:
        """All that was committed so far, with what an exact undo elsewhere takes."""

    @abstractmethod
    def base_weights(self) -> AbstractContextManager[None]:
        """Context manager: the unedited model."""

    @abstractmethod
    def check(self) -> None:
        """Checks that what is edited is as the last committed edit left it.

        Raises:
            EditError: If something else wrote to it.
        """

    @abstractmethod
    def prepare(self, verb: str) -> None:
        """Brings the model into the form that a verb of the Trainer needs.

        Args:
            verb: ``fit``, ``validate``, ``test`` or ``predict``; none once the Trainer is done.
        """

    @abstractmethod
    def size(self) -> tuple[str, float]:
        """Name and value of the figure by which a run shows how much has been changed."""

    @abstractmethod
    def kept(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint keeps of a module's state, whose names begin with ``model.``."""

    @abstractmethod
    def load_kept(self, state: dict[str, Tensor]) -> None:
        """Takes over what ``kept`` gave where Lightning does not, and may take it out."""


class WeightTarget(Target[WeightDelta]):
    """Weights: parameters of the model, all others being frozen while they are edited.

    Args:
        model: The model. It is edited in place.
        names: Names of the parameters.
        trainable: Whether these get gradients.

    Examples:
        >>> target = WeightTarget(nn.Linear(2, 2), ["weight"])
        >>> target.size(), target.trainable
        (('relative_norm', 0.0), ('weight',))
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, trainable: bool = True) -> None:
        named = dict(model.named_parameters())
        originals = {name: named[name].detach().clone() for name in names}
        super().__init__(model, EditOptimizer(model, originals))
        self.trainable = tuple(names) if trainable else ()

    @property
    @override
    def delta(self) -> WeightDelta:
        return self.optimizer.delta

    @property
    @override
    def request_ids(self) -> Collection[str]:
        return self.delta.provenance.request_ids

    @property
    @override
    def memory(self) -> EditMemory:
        raise EditError("This editor changes weights, and the model has no memory.")

    @override
    def made_again(self, request_ids: Sequence[str]) -> list[RequestBatch]:
        return batches_without(self.delta.parts, self.request_ids, request_ids)

    @override
    def remove(
        self, request_ids: Sequence[str], again: Callable[[RequestBatch], WeightDelta]
    ) -> WeightDelta:
        before, left = self.delta, self.made_again(request_ids)
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._replay(left, again, len(request_ids))
        except BaseException:  # an interruption, too, leaves the model as it was
            restore(self.parameters, kept)
            self.optimizer.take_over(before)
            raise
        return (self.delta - before).seal(self.model, kept)

    @override
    def committed(self) -> WeightDelta:
        total = self.delta.seal(self.model, self.originals)
        total.provenance = Provenance(request_ids=self.delta.provenance.request_ids)
        return total

    @override
    def check(self) -> None:
        self.optimizer.check()

    @override
    @contextmanager
    def base_weights(self) -> Iterator[None]:
        with kept_weights(self.parameters):
            restore(self.parameters, self.originals)
            yield

    @override
    def prepare(self, verb: str) -> None:
        """Nothing: the model is as it is."""

    @override
    def size(self) -> tuple[str, float]:
        return "relative_norm", self.relative_norm()

    @override
    def kept(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: t for n, t in state.items() if n.removeprefix("model.") in self.originals}

    @override
    def load_kept(self, state: dict[str, Tensor]) -> None:
        """Nothing: Lightning loads parameters."""


class MemoryTarget(Target[MemoryWrite]):
    """A memory beside the weights, which stay as they are.

    Args:
        model: The model. A memory that it has already is gone on with, unless it is another one and
            holds nothing: then this one takes its place.
        memory: An empty memory, built from an editor's settings.
        forget: Gives the entries that are left when requests are forgotten, some of them made anew
            if need be; the memory's own way, which leaves them as they are, if None.

    Raises:
        ArtifactError: If the model has entries in a memory of another kind or with other settings.
    """

    def __init__(
        self,
        model: nn.Module,
        memory: EditMemory,
        forget: Callable[[Sequence[str]], Mapping[str, MemoryEntry]] | None = None,
    ) -> None:
        found = EditMemory.find(model)
        if found is not None and found is not memory:
            about = type(memory).__name__, memory.settings
            if len(found):
                found.check_kind(*about)
            memory = found if found.is_of(*about) else memory
        memory.attach_(model).is_temporary = False
        super().__init__(model, _MemoryOptimizer(model, memory))
        # In a tuple, out of sight of Lightning, for which it is a part of the model.
        self._memory = (memory,)
        self._forget = forget

    @property
    @override
    def delta(self) -> MemoryWrite:
        return self.optimizer.delta

    @property
    @override
    def request_ids(self) -> Collection[str]:
        return self.memory.request_ids

    @property
    @override
    def memory(self) -> EditMemory:
        """The memory, in the model again where another editor's took its place and holds nothing.

        Raises:
            EditError: If this one holds nothing, and the model has entries in another one.
        """
        memory, found = self._memory[0], EditMemory.find(self.model)
        if found is not memory and not len(memory):
            memory.attach_(self.model)
        return memory

    @override
    def made_again(self, request_ids: Sequence[str]) -> list[RequestBatch] | None:
        """The batches that are left; None where it is not known what made all that is held."""
        parts = self.delta.parts
        asked = requests_of(parts).keys()
        if None in parts or not asked >= set(self.request_ids):
            self.memory.check_ids(request_ids)
            return None
        return batches_without(parts, asked, request_ids)

    @override
    def remove(
        self, request_ids: Sequence[str], again: Callable[[RequestBatch], MemoryWrite]
    ) -> MemoryWrite:
        left = self.made_again(request_ids)
        if left is None:
            return self._forgotten(request_ids)
        before, held = self.delta, self.memory.entries
        try:
            with self.memory.kept(always=False):
                self._replay(left, again, len(request_ids))
        except BaseException:  # an interruption, too, leaves the memory as it was
            self.optimizer.take_over(before)
            raise
        return MemoryWrite.between(self.memory, self.memory.entries, held)

    def _forgotten(self, request_ids: Sequence[str]) -> MemoryWrite:
        """Has the memory forget requests; returns what has changed."""
        others = len(set(self.request_ids) - set(request_ids))
        if others and self._forget is None:
            rank_zero_warn(
                f"The memory forgets {len(request_ids)} request(s), and {others} others stay as "
                "they were made. What they were made of is not known: this editor did not commit "
                "all of them, or goes on from a checkpoint of an earlier version. Those that were "
                "learned on top of what is gone may answer otherwise than in a run without it; for "
                "that, edit the unedited model with the requests that are to stay."
            )
        forget = self._forget or self.memory.without
        edit = MemoryWrite.between(self.memory, forget(request_ids))
        total = self.delta + edit
        total.batches = narrowed(self.delta.parts, request_ids)
        self.optimizer.rewind(total)
        return edit

    @override
    def committed(self) -> MemoryWrite:
        total = self.delta.seal(self.model, {})
        total.provenance = Provenance(request_ids=self.delta.provenance.request_ids)
        return total

    @override
    def check(self) -> None:
        """Nothing: what was committed is what the memory holds."""

    @override
    @contextmanager
    def base_weights(self) -> Iterator[None]:
        with self.memory.off():
            yield

    @override
    def prepare(self, verb: str) -> None:
        """Nothing: the model is as it is."""

    @override
    def size(self) -> tuple[str, float]:
        return "entries", float(len(self.memory))

    @override
    def kept(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: t for n, t in state.items() if n.startswith(f"model.{MEMORY_PREFIX}")}

    @override
    def load_kept(self, state: dict[str, Tensor]) -> None:
        prefix = f"model.{MEMORY_PREFIX}"
        own = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        if own:
            self.memory.load_state_dict(own)


@contextmanager
def no_new_memory(model: nn.Module) -> Iterator[None]:
    """Context manager: a memory that was attached in it is taken off again if it fails."""
    before = EditMemory.find(model)
    try:
        yield
    except BaseException:
        memory = EditMemory.find(model)
        if memory is not None and memory is not before:
            memory.detach_()
        if before is not None and memory is not before:
            before.attach_(model)
        raise


def check_target(target: Target[E], given: nn.Module) -> None:
    """Checks that what is edited takes effect in a model that may be wrapped, and has names there.

    Args:
        target: What is edited in the model.
        given: The model with what wraps it.

    Raises:
        ModelError: If a memory is put into a compiled model, or weights lie in an adapter.
    """
    if isinstance(target, MemoryTarget):
        check_not_compiled(given)
    plain = plain_names(target.model)
    inside = [name for name in target.originals if plain.get(name) != name]
    if inside:
        raise ModelError(
            f"`{inside[0]}` lies in an adapter, so that its edit would have no name in the plain "
            "model. Merge the adapter first (`model.merge_and_unload()` of peft), or edit other "
            "layers or modules."
        )


@contextmanager
def kept_weights(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Context manager: puts parameters back after it, bit for bit, whatever happens in it.

    Gradients that were accumulated so far, and which parameters get any, are put back, too.

    Args:
        parameters: The parameters by name.

    Examples:
        >>> layer = nn.Linear(1, 1)
        >>> before = layer.weight.item()
        >>> with kept_weights({"weight": layer.weight}), torch.no_grad():
        ...     _ = layer.weight.zero_()
        >>> layer.weight.item() == before
        True
    """
    kept = {name: p.detach().clone() for name, p in parameters.items()}
    flags = {name: p.requires_grad for name, p in parameters.items()}
    gradients = {name: p.grad for name, p in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
                parameter.requires_grad_(flags[name])
                parameter.grad = gradients[name]


@torch.no_grad()
def restore(parameters: Mapping[str, nn.Parameter], originals: Mapping[str, Tensor]) -> None:
    """Sets parameters to their originals, each process its own part of them."""
    for name, parameter in parameters.items():
        local_shard(parameter).copy_(shard_like(parameter, originals[name]))


class _MemoryOptimizer(EditOptimizer[MemoryWrite]):
    """Writes edits of a memory, and asks the memory itself what was committed."""

    def __init__(self, model: nn.Module, memory: EditMemory) -> None:
        self._order: tuple[str, ...] = ()
        self._carried: dict[str, Tensor] = {}
        self._batches: Batches = ()
        # Ids in the memory as it was left here.
        self._left: frozenset[str] = frozenset()
        # The edit that was last made of all, by what it was made of.
        self._made: tuple[object, MemoryWrite] | None = None
        nothing = MemoryWrite(type(memory).__name__, memory.settings, {})
        super().__init__(model, {}, nothing)

    @property
    def delta(self) -> MemoryWrite:
        """All that the memory holds."""
        memory = EditMemory.find(self.model)
        if self._made is None or memory is None or self._made[0] is not memory.state:
            edit = MemoryWrite.from_state({}, self.model)
            self._describe(edit, [] if memory is None else memory.request_ids)
            self._made = None if memory is None else memory.state, edit
        return self._made[1]

    @delta.setter
    def delta(self, edit: MemoryWrite) -> None:
        self._order, self._carried = edit.provenance.request_ids, edit.carried
        memory = EditMemory.find(self.model)
        self._left = frozenset(() if memory is None else memory.request_ids)
        self._batches, self._made = edit.batches, None

    def _describe(self, edit: MemoryWrite, known: Collection[str]) -> None:
        """Adds what the memory itself does not know of an edit of all that it holds."""
        ids = self._order
        if len(ids) != len(known) or not all(map(known.__contains__, ids)):
            ids = tuple(dict.fromkeys((*filter(known.__contains__, ids), *known)))
        edit.provenance = Provenance(request_ids=ids)
        edit.carried, edit.batches = self._carried, self._batches
        # What an edit has pushed out comes back without that edit; what was taken out does not.
        if gone := self._left.difference(known):
            edit.batches = narrowed(self._batches, gone)
