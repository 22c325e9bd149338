# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""An edit is one optimizer step: the optimizer that writes staged edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Generic, cast, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict
from typing_extensions import TypeVar

from lightning_edit.core.committed import RequestBatch, requests_of
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import EditError
from lightning_edit.core.hashing import quick_hash
from lightning_edit.core.request import EditRequest
from lightning_edit.core.sharding import everywhere, frobenius_norm, reshard

__all__ = ["E", "EditOptimizer"]

#: The kind of edits that an editor makes.
E = TypeVar("E", bound=Edit, default=WeightDelta)
R = TypeVar("R")


class EditOptimizer(Optimizer, Generic[E]):
    """Writes a staged ``Edit`` at each step.

    The step is what Lightning counts, checkpoints and resumes by. Weights are set to original
    plus the sum of all edits so far, so the order of rounding does not depend on interruptions.
    What something else wrote to them would be lost, so a step is refused then.

    Args:
        model: The model whose parameters the edits name.
        originals: Parameter name to the tensor that stood there before the first edit.
        nothing: The sum of no edits, of the kind that will be staged; one of weights when None.

    Examples:
        >>> import torch
        >>> from lightning_edit.core.change import LowRank
        >>> from lightning_edit.core.delta import WeightDelta
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> optimizer = EditOptimizer(layer, {"weight": layer.weight.detach().clone()})
        >>> optimizer.stage(WeightDelta({"weight": LowRank(torch.ones(2, 1), torch.ones(2, 1))}))
        >>> optimizer.step()
        >>> optimizer.delta
        WeightDelta(weight: rank 1)
    """

    def __init__(
        self, model: nn.Module, originals: Mapping[str, Tensor], nothing: E | None = None
    ) -> None:
        named = dict(model.named_parameters())
        # An optimizer wants a parameter, also where edits touch none.
        parameters = [named[name] for name in originals] or [nn.Parameter(torch.zeros(()))]
        super().__init__(parameters, {})
        self.model = model
        self.originals = dict(originals)
        self._nothing: E = cast(E, WeightDelta({})) if nothing is None else nothing
        self.delta: E = self._nothing
        self._staged: E | None = None
        #: The edit that the last step wrote; None before the first, and after a step without one.
        self.written: E | None = None
        #: Edits that steps have written since whoever put a list here; None once anything else has
        #: changed what is committed.
        self.journal: list[E] | None = None
        self._requests: dict[str, EditRequest] | None = None
        # Fingerprints of the weights as they were left here; unknown until they are asked for.
        self._marks: dict[str, tuple[object, ...]] = {}

    def stage(self, edit: E) -> None:
        """Sets the edit that the next step writes."""
        self._staged = edit

    def rewind(self, delta: E | None = None) -> None:
        """Goes back to an earlier sum of edits: to none, or to one that ``delta`` was."""
        earlier = self._nothing if delta is None else delta
        earlier.reset_(self.model, self.originals)
        self.take_over(earlier)

    def take_over(self, delta: E) -> None:
        """Goes on from edits that stand in the model already."""
        self.journal = self._requests = None
        self.delta, self._marks = delta, self._quick_hashes()

    @property
    def is_intact(self) -> bool:
        """Whether the weights are original + all edits so far, and nothing else wrote to them."""
        return not self._foreign()

    def check(self) -> None:
        """Checks that the weights are original + all edits so far.

        Raises:
            EditError: If something else wrote to them.
        """
        if foreign := self._foreign():
            raise EditError(
                f"`{foreign[0]}` is not what this editor left there"
                + (f" (nor are {len(foreign) - 1} others)" if foreign[1:] else "")
                + ": something else wrote to it, such as an edit's `apply_`, a callback that "
                "averages weights, training, or a checkpoint without the edits. Going on would "
                "lose that. Take it out again (`revert_`), commit edits with "
                "`editor.commit(edit)`, or make a new editor of the model as it stands."
            )

    def _foreign(self) -> list[str]:
        """Names of the parameters that are not original + all edits so far."""
        found = self._quick_hashes()
        changed = [
            name
            for name, mark in found.items()
            if not everywhere(self.model.get_parameter(name), mark == self._marks.get(name))
        ]
        # A new or resumed run knows no fingerprints yet.
        foreign = [
            name
            for name in changed
            if not self.delta.made(name, self.model.get_parameter(name), self.originals[name])
        ]
        self._marks |= {name: found[name] for name in changed if name not in foreign}
        return foreign

    def _quick_hashes(self) -> dict[str, tuple[object, ...]]:
        reshard(self.model)
        return {name: quick_hash(self.model.get_parameter(name)) for name in self.originals}

    @property
    def requests(self) -> Mapping[str, EditRequest]:
        """Requests that edits were made of, where these are known, by id; the last of each."""
        if self._requests is None:
            self._requests = requests_of(self.delta.batches)
        return self._requests

    @cached_property
    def norm_of_originals(self) -> float:
        """‖W‖ over all originals, which stay what they are."""
        return frobenius_norm(self.originals)

    @property
    def marks(self) -> Mapping[str, tuple[object, ...]]:
        """Fingerprints of the weights, or of this process's parts, as the last step left them."""
        return self._marks

    @property
    def nothing(self) -> E:
        """A sum of no edits, which a step may write without changing anything."""
        return self._nothing + self._nothing

    @property
    def staged(self) -> E | None:
        """The edit that the next step writes: inspect, replace or drop it before the step."""
        return self._staged

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], R]) -> R: ...

    def step(self, closure: Callable[[], object] | None = None) -> object:
        """Writes the staged edit; without one, the step changes nothing.

        Raises:
            EditError: If the edit changes what the editor did not announce, or something else
                wrote to the weights since the last step.
        """
        result = closure() if closure is not None else None
        self.written = None
        if self._staged is not None:
            self._staged.check_targets(self.model, self.originals)
            self._staged.check_finite()
            self.check()
            total = self.delta + self._staged
            parts = self._staged.parts
            # Edits that were added up were not made after one another, so not of these requests.
            total.batches = (*self.delta.parts, *(parts if len(parts) < 2 else (None,)))
            before, journal, requests = self.delta, self.journal, self._requests
            try:
                total.write_(self.model, self.originals)
                self.take_over(total)
            except BaseException:  # an interruption, too, leaves the last committed state
                self.rewind(before)
                raise
            self.written, self._staged = self._staged, None
            if journal is not None:
                journal.append(self.written)
                self.journal = journal
            if requests is not None:
                requests.update(requests_of(parts))
                self._requests = requests
        return result

    def state_dict(self) -> StateDict:
        """The sum of all edits so far, as tensors and names."""
        return {
            "state": {},
            "param_groups": [],
            "delta": self.delta.state_dict(),
            "carried": dict(self.delta.carried),
            "request_ids": list(self.delta.provenance.request_ids),
            "batches": [batch and batch.to_dict() for batch in self.delta.batches],
        }

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Takes over the edits of an earlier run; what they changed comes with the model."""
        delta = self._nothing.from_state(state_dict["delta"], self.model)
        for part in state_dict.get("parts", ()):  # added up as the steps did that wrote them
            delta = delta + self._nothing.from_state(part, self.model)
        delta.provenance = replace(
            self.delta.provenance, request_ids=tuple(state_dict.get("request_ids", ()))
        )
        device = next(self.model.parameters()).device
        delta.carried = {
            name: tensor.to(device) for name, tensor in state_dict.get("carried", {}).items()
        }
        delta.batches = tuple(
            batch and RequestBatch.from_dict(batch) for batch in state_dict.get("batches", ())
        )
        # Lightning loads the weights before or after, so that they are looked at when it matters.
        self.delta, self._marks = delta, {}
        self.journal = self._requests = None
