# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""An adapter that is in the model while it is trained, and merged into its weights otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.sharding import local_shard, shard_like, whole_tensor
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.modules.fine_tuning.adapter_layers import AdapterLayers
from lightning_edit.modules.fine_tuning.tuned_weights import (
    TunedTarget,
    TunedWeights,
    sealed,
    write_tuned,
)

__all__ = ["AdapterTarget"]


class AdapterTarget(TunedTarget):
    """Weights that an adapter changes.

    The adapter's layers are in the model during ``fit`` only, and merged into it otherwise.

    Args:
        model: The model.
        names: Names of the weights that are adapted.
        request_ids: Gives the ids of the requests that the adapter was trained on so far.
        make: Makes a fresh adapter of the model.
        before_attaching: Called while the model is a plain one, before the layers come into it.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        request_ids: Callable[[], Iterable[str]],
        make: Callable[[], AdapterLayers],
        before_attaching: Callable[[], object],
    ) -> None:
        self._weights = TunedWeights(model, names, request_ids)
        self._request_ids = request_ids
        self._make = make
        self._before_attaching = before_attaching
        self._adapter: AdapterLayers | None = None
        # The weights beneath the adapter while it is merged into them.
        self._beneath: dict[str, Tensor] = {}
        super().__init__(model, self._weights.optimizer)

    @property
    def adapter(self) -> AdapterLayers:
        """The adapter that ``fit`` trains, made at the first use."""
        if self._adapter is None:
            self._adapter = self._make()
        return self._adapter

    @property
    def is_attached(self) -> bool:
        """Whether the adapter's layers are in the model."""
        return self._adapter is not None and self._adapter.is_attached

    @override
    def tuned_parameters(self) -> list[nn.Parameter]:
        return self.adapter.parameters

    @override
    def prepare(self, verb: str) -> None:
        if verb == "fit":
            self._attach()
            return
        self._merge()
        if verb == "test":
            self.optimizer.take_over(self.delta)

    def _attach(self) -> None:
        """From the plain model to one with the adapter in it."""
        if self.adapter.is_attached:
            return
        self._before_attaching()
        with torch.no_grad():
            for name, weight in self.adapter.base().items():
                if name in self._beneath:
                    weight.copy_(self._beneath[name])
        self._beneath = {}
        self.adapter.attach()

    def _merge(self) -> None:
        """From the model with the adapter in it to the plain one with the adapter's change."""
        if not self.is_attached:
            return
        weights = self.adapter.base()
        self._beneath = {name: weight.detach().clone() for name, weight in weights.items()}
        self.adapter.detach()
        self.delta.write_(self.model, self.originals)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Context manager: the plain model, with the adapter's change in its weights."""
        was_attached = self.is_attached
        self._merge()
        try:
            yield
        finally:
            if was_attached:
                self._attach()

    @override
    @contextmanager
    def base_weights(self) -> Iterator[None]:
        with self.plain(), self._weights.base_weights():
            yield

    @property
    @override
    def delta(self) -> WeightDelta:
        """(alpha/r) B A of the adapter, and what else was done to the weights beneath it."""
        if self._adapter is None:
            return self._weights.delta
        changes = self._adapter.changes()
        delta = WeightDelta({n: c for n, c in changes.items() if bool(c.u.any() and c.v.any())})
        delta = delta + WeightDelta.between(self.originals, self._weights_beneath())
        ids = tuple(self._request_ids())
        delta.provenance = replace(delta.provenance, request_ids=ids)
        return delta

    def _weights_beneath(self) -> dict[str, Tensor]:
        weights = self._beneath or {n: w.detach() for n, w in self.adapter.base().items()}
        return {name: weight.to(self.originals[name].device) for name, weight in weights.items()}

    @override
    def settle(self) -> None:
        if not self.is_attached:  # else once it is merged
            write_tuned(self, self.delta)

    @override
    def committed(self) -> WeightDelta:
        with self.plain():
            delta = self.delta
            write_tuned(self, delta)
            return sealed(self, delta)

    @override
    def size(self) -> tuple[str, float]:
        return "relative_norm", self.relative_norm()

    # -- checkpoints -------------------------------------------------------------------------

    @override
    def kept(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter, and weights beneath it if a callback changed them."""
        factors = {f"model.{name}": t.detach() for name, t in self.adapter.state().items()}
        # What is in the state was gathered with it.
        kept = {n: state[n] if n in state else whole_tensor(t) for n, t in factors.items()}
        for name, weight in self._weights_beneath().items():
            if not torch.equal(weight, self.originals[name]):
                kept[f"model.{name}"] = weight
        return kept

    @override
    def load_kept(self, state: dict[str, Tensor]) -> None:
        self.adapter.load({name.removeprefix("model."): t for name, t in state.items()})
        was_attached = self.is_attached
        self._attach()
        with torch.no_grad():
            for name, weight in self.adapter.base().items():
                beneath = state.get(f"model.{name}", self.originals[name])
                local_shard(weight).copy_(shard_like(weight, beneath))
        if not was_attached:
            # The plain model gets the change, and the layers, which are not in it, have theirs.
            self._merge()
            state.clear()

    # -- as of any weights -------------------------------------------------------------------

    @property
    @override
    def memory(self) -> EditMemory:
        return self._weights.memory
