# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Weights that a training has changed: what is committed is their difference from the originals."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NoReturn

from torch import Tensor, nn
from typing_extensions import override

from lightning_edit.core.committed import RequestBatch
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import EditError
from lightning_edit.core.provenance import Provenance
from lightning_edit.core.sharding import whole_tensor
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.modules.targets import Target, WeightTarget

__all__ = ["TunedTarget", "TunedWeights"]


class TunedTarget(Target[WeightDelta]):
    """What is tuned in a model, by an optimizer that knows nothing of edits."""

    @abstractmethod
    def tuned_parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps on."""

    @abstractmethod
    def settle(self) -> None:
        """Sets the weights to original + change, which a last bit may tell from the tuned ones."""

    @property
    @override
    def request_ids(self) -> Sequence[str]:
        return self.delta.provenance.request_ids

    @override
    def made_again(self, request_ids: Sequence[str]) -> NoReturn:
        raise EditError(
            "The weights were trained on all requests together, so that single ones cannot be "
            "taken out of them. Train the unedited model with the requests that are to stay."
        )

    @override
    def remove(
        self, request_ids: Sequence[str], again: Callable[[RequestBatch], WeightDelta]
    ) -> NoReturn:
        self.made_again(request_ids)

    @override
    def check(self) -> None:
        """Nothing: the change is whatever the weights differ by from their originals."""


class TunedWeights(TunedTarget):
    """Weights of the model that are tuned in place.

    Args:
        model: The model.
        names: Names of the parameters.
        request_ids: Gives the ids of the requests that they were tuned on so far.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], request_ids: Callable[[], Iterable[str]]
    ) -> None:
        self._weights = WeightTarget(model, names)
        self._request_ids = request_ids
        super().__init__(model, self._weights.optimizer)
        self.trainable = self._weights.trainable

    @override
    def tuned_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters.values())

    @property
    @override
    def delta(self) -> WeightDelta:
        """The difference of the weights as they stand and the originals."""
        originals = {n: whole_tensor(t) for n, t in self.originals.items()}
        tuned = {
            name: whole_tensor(parameter.detach()).to(originals[name].device)
            for name, parameter in self.parameters.items()
        }
        delta = WeightDelta.between(originals, tuned)
        delta.provenance = replace(delta.provenance, request_ids=tuple(self._request_ids()))
        return delta

    @override
    def settle(self) -> None:
        write_tuned(self, self.delta)

    @override
    def committed(self) -> WeightDelta:
        delta = self.delta
        write_tuned(self, delta)
        return sealed(self, delta)

    @override
    def prepare(self, verb: str) -> None:
        if verb == "test":  # what is edited then goes on from here
            self.optimizer.take_over(self.delta)

    @override
    def size(self) -> tuple[str, float]:
        return "relative_norm", self.relative_norm()

    # -- as of any weights -------------------------------------------------------------------

    @property
    @override
    def memory(self) -> EditMemory:
        return self._weights.memory

    @override
    def base_weights(self) -> AbstractContextManager[None]:
        return self._weights.base_weights()

    @override
    def kept(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._weights.kept(state)

    @override
    def load_kept(self, state: dict[str, Tensor]) -> None:
        self._weights.load_kept(state)


def write_tuned(target: Target[WeightDelta], delta: WeightDelta) -> None:
    """Sets the weights of the plain model to original + change, and commits the change."""
    delta.write_(target.model, target.originals)
    target.optimizer.take_over(delta)


def sealed(target: Target[WeightDelta], delta: WeightDelta) -> WeightDelta:
    """A change that stands in the model, with what an exact undo elsewhere takes."""
    ids = Provenance(request_ids=delta.provenance.request_ids)
    return WeightDelta(delta.changes, ids).seal(target.model, target.originals)
