# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""An edit is one optimizer step: the optimizer that writes staged edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_edit.core.delta import LowRank, WeightDelta
from lightning_edit.core.errors import EditError
from lightning_edit.core.sharding import local_shard, shard_like

__all__ = ["EditOptimizer"]


class EditOptimizer(Optimizer):
    """Writes a staged :class:`~lightning_edit.core.delta.WeightDelta` at each step.

    The step is what Lightning counts, checkpoints and resumes by. Weights are set to original
    plus the sum of all edits so far, so the order of rounding does not depend on interruptions.

    Args:
        model: The model whose parameters the edits name.
        originals: Parameter name to the tensor that stood there before the first edit.

    Example:
        >>> import torch
        >>> from lightning_edit.core.delta import LowRank, WeightDelta
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> optimizer = EditOptimizer(layer, {"weight": layer.weight.detach().clone()})
        >>> optimizer.stage(WeightDelta({"weight": LowRank(torch.ones(2, 1), torch.ones(2, 1))}))
        >>> optimizer.step()
        >>> optimizer.delta
        WeightDelta(weight: rank 1)
    """

    def __init__(self, model: nn.Module, originals: Mapping[str, Tensor]) -> None:
        named = dict(model.named_parameters())
        super().__init__([named[name] for name in originals], {})
        self.model = model
        self.originals = dict(originals)
        self.delta = WeightDelta({})
        self._staged: WeightDelta | None = None

    def stage(self, edit: WeightDelta) -> None:
        """Sets the edit that the next step writes."""
        self._staged = edit

    def rewind(self, delta: WeightDelta | None = None) -> None:
        """Goes back to an earlier sum of edits: to none, or to one that :attr:`delta` was."""
        self.delta = WeightDelta({}) if delta is None else delta
        self._rewrite()

    @property
    def staged(self) -> WeightDelta | None:
        """The edit that the next step writes: inspect, replace or drop it before the step."""
        return self._staged

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Writes the staged edit; without one, the step changes nothing.

        Raises:
            EditError: If the edit changes a parameter whose original is not kept.
        """
        result = closure() if closure is not None else None
        if self._staged is not None:
            unknown = set(self._staged.changes) - set(self.originals)
            if unknown:
                raise EditError(
                    f"The edit changes {', '.join(sorted(unknown))}, which the editor did not "
                    f"announce. Announced: {', '.join(self.originals)}."
                )
            total = self.delta + self._staged
            try:
                total.write_(self.model, self.originals)
            except BaseException:  # an interruption, too, leaves the last committed state
                self._rewrite()
                raise
            self.delta, self._staged = total, None
        return result

    def _rewrite(self) -> None:
        """Sets the weights to what was committed."""
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, original in self.originals.items():
                local_shard(named[name]).copy_(shard_like(named[name], original))
        self.delta.write_(self.model, self.originals)

    def state_dict(self) -> dict[str, Any]:
        """The sum of all edits so far, as tensors and names."""
        tensors: dict[str, Tensor] = {}
        for name, change in self.delta.changes.items():
            if isinstance(change, LowRank):
                tensors[f"{name}.u"], tensors[f"{name}.v"] = change.u, change.v
            else:
                tensors[f"{name}.dense"] = change
        return {
            "state": {},
            "param_groups": [],
            "delta": tensors,
            "carried": dict(self.delta.carried),
            "request_ids": list(self.delta.provenance.request_ids),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over the edits of an earlier run; the weights themselves come with the model."""
        # Lightning moves what a torch optimizer keeps to the device of the model, but not this.
        tensors: dict[str, Tensor] = {
            key: tensor.to(self.model.get_parameter(key.rpartition(".")[0]).device)
            for key, tensor in state_dict["delta"].items()
        }
        changes = {
            name: tensors[f"{name}.dense"]
            if f"{name}.dense" in tensors
            else LowRank(tensors[f"{name}.u"], tensors[f"{name}.v"])
            for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors)
        }
        provenance = replace(
            self.delta.provenance, request_ids=tuple(state_dict.get("request_ids", ()))
        )
        self.delta = WeightDelta(changes, provenance)
        device = next(self.model.parameters()).device
        self.delta.carried = {
            name: tensor.to(device) for name, tensor in state_dict.get("carried", {}).items()
        }
