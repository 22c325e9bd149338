# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a model's trainable parameters were when a run began."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from lightning_edit.core.change import Change
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError, ModelError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.core.sharding import local_shard, shard_like, whole_tensor
from lightning_edit.core.wrappers import plain_names
from lightning_edit.forgetting.adapter_vectors import adapter_changes, has_adapter
from lightning_edit.functional.task_vector import forget_learned, task_vector

__all__ = ["BaseWeights"]

_PAPER = "https://arxiv.org/abs/2212.04089"


class BaseWeights:
    """Trainable parameters as they were, on the CPU; of sharded ones this process's part.

    Args:
        shards: Parameter name, as in the model, to its local part.
        adapts: Whether the parameters are those of LoRA layers.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> base = BaseWeights.of(layer)
        >>> _ = layer.weight.data.add_(1.0)
        >>> base.task_vector(layer).dense("weight").tolist()
        [[1.0, 1.0]]
    """

    def __init__(self, shards: dict[str, Tensor], *, adapts: bool) -> None:
        self.shards = shards
        self.adapts = adapts

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Copies what is trainable now.

        Raises:
            ModelError: If nothing is trainable, or an adapter trains more than plain LoRA factors.
        """
        adapts = has_adapter(model)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ModelError(
                "The model has no trainable parameter, so a run cannot teach it anything. Set "
                "`requires_grad` on its weights, or add an adapter."
            )
        factor = re.compile(r"\.lora_[AB]\.[^.]+\.weight$")
        foreign = [name for name in trainable if not factor.search(name)]
        if adapts and foreign:
            raise ModelError(
                f"Beside LoRA factors `{foreign[0]}` is trained, so the run's change is no "
                "low-rank vector. Train LoRA without biases, DoRA and `modules_to_save`."
            )
        shards = {n: local_shard(p).to("cpu", copy=True) for n, p in trainable.items()}
        return cls(shards, adapts=adapts)

    @classmethod
    def from_whole(cls, model: nn.Module, tensors: Mapping[str, Tensor]) -> Self:
        """Takes over what ``whole`` returned in an earlier run.

        Raises:
            ArtifactError: If a parameter is missing or has another shape.
        """
        named = dict(model.named_parameters())
        for name, tensor in tensors.items():
            if name not in named or named[name].shape != tensor.shape:
                raise ArtifactError(
                    f"The checkpoint knows `{name}` of the shape {list(tensor.shape)} from the "
                    "beginning of its run; this model has no such parameter. Resume with the same "
                    "model and adapter."
                )
        shards = {
            name: shard_like(named[name], t).to("cpu", copy=True) for name, t in tensors.items()
        }
        return cls(shards, adapts=has_adapter(model))

    def whole(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters as they were, gathered; every process must call this."""
        named = dict(model.named_parameters())
        return {name: whole_tensor(named[name], shard).cpu() for name, shard in self.shards.items()}

    @torch.no_grad()
    def restore_(self, model: nn.Module) -> None:
        """Puts the parameters back."""
        named = dict(model.named_parameters())
        for name, shard in self.shards.items():
            local_shard(named[name]).copy_(shard)

    @torch.no_grad()
    def forget_learned_(self, model: nn.Module, rate: float) -> None:
        """θ ← (1 + λ) θ_then − λ θ_now, elementwise, for parameters that are weights."""
        named = dict(model.named_parameters())
        for name, shard in self.shards.items():
            weight = local_shard(named[name])
            weight.copy_(forget_learned(shard.to(weight.device), weight, rate))

    def task_vector(self, model: nn.Module, *, keep: bool = True) -> WeightDelta:
        """τ = θ_now − θ_then, by the plain model's names; every process must call this.

        Args:
            model: The model after training.
            keep: Whether this process wants the vector, or only takes part in gathering it.

        Returns:
            Dense changes; for LoRA layers the low-rank change of the weights beneath.
        """
        changes: dict[str, Change] = {}
        if self.adapts:
            then = WeightDelta(adapter_changes(model, self.whole(model)))
            # B begins at zero, and a product that is zero needs no factors.
            begun = {name: c for name, c in then.changes.items() if bool(then.dense(name).any())}
            now = WeightDelta(adapter_changes(model))
            changes = (now - WeightDelta(begun)).changes
        else:
            named = dict(model.named_parameters())
            plain = {actual: name for name, actual in plain_names(model).items()}
            for name, shard in self.shards.items():
                tau = task_vector(shard, local_shard(named[name]).cpu())
                tau = whole_tensor(named[name], tau).cpu()
                if keep and bool(tau.any()):
                    changes[plain[name]] = tau
        return WeightDelta(changes)

    def save_task_vector(
        self, model: nn.Module, folder: str | Path, settings: Mapping[str, object], is_writer: bool
    ) -> None:
        """Writes τ as an artefact; every process must call this.

        Args:
            model: The model after training.
            folder: Replaced if it holds an earlier vector.
            settings: How the vector was learned, for its description.
            is_writer: Whether this process writes the files.
        """
        vector = self.task_vector(model, keep=is_writer)
        vector.provenance = Provenance("TaskVector", _PAPER, dict(settings), self.info(model))
        if is_writer:
            vector.save(folder, originals=False)

    def edit(self, model: nn.Module) -> WeightDelta:
        """τ with what it replaces, for an exact undo; every process must call this.

        Of LoRA layers, which leave the weights beneath alone, nothing is replaced.
        """
        vector = self.task_vector(model)
        if self.adapts:
            return vector
        plain = {actual: name for name, actual in plain_names(model).items()}
        return vector.seal(model, {plain[name]: t for name, t in self.whole(model).items()})

    def info(self, model: nn.Module) -> BaseModelInfo:
        """The model as it was; every process must call this."""
        return BaseModelInfo(
            id=getattr(getattr(model, "config", None), "_name_or_path", ""),
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            sha256="" if self.adapts else weight_hash(model, self.whole(model)),
            parameters=sum(p.numel() for p in model.parameters()),
        )
