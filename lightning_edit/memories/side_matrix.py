# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Side copies of one weight matrix, each used for the prompts whose activations it moves far."""

# Shapes: N entries, Z entries of the matrix that a copy may change, S copies, O outputs and I
# inputs of the layer, B rows, T positions.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_edit.core.locator import StackKind
from lightning_edit.core.sharding import plain
from lightning_edit.core.side_memory import MemoryEntry
from lightning_edit.functional.wise import activation_distance, ties
from lightning_edit.memories.routed import LayerMemory

__all__ = ["RoutesBy", "SideMatrices", "mask_indices"]

RoutesBy = Literal["distance", "ratio"]


def mask_indices(numel: int, keep_ratio: float, seed: int) -> Tensor:
    """Which entries of a matrix a side copy may change, drawn at random.

    Args:
        numel: Entries of the matrix.
        keep_ratio: Share ρ of them.
        seed: Seed of the draw.

    Returns:
        Sorted indices into the flat matrix, [Z] int64.

    Examples:
        >>> mask_indices(10, 0.3, 0).shape
        torch.Size([3])
    """
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randperm(numel, generator=generator)[: max(1, round(keep_ratio * numel))]
        .sort()
        .values
    )


class SideMatrices(LayerMemory):
    """The side memories of WISE (arXiv 2405.14768), looked up once for each prompt.

    Edits are numbered. ``copy_size`` of them share a side copy W' = W + Δ, in a random share of
    its entries; when ``merged_copies`` copies are full, TIES makes them one. Of the copies whose
    D over a prompt's tokens is at least ``act_ratio`` times the least D of their edits, the one
    with the largest D answers, or with the largest D over that least D; where there is none, the
    layer's output keeps its bits.

    Each edit's own change is kept, so that it can be taken out of its copy. Later edits of the
    same copy were learned on top of it.

    Its buffers are ``changes`` [N, Z] and ``distances`` [N], the D of each edit; float32.

    Args:
        module: Name of the linear layer in the model.
        shape: O and I.
        stack: The stack that the layer is in.
        activation: Name of the activation function a, as transformers knows it.
        act_ratio: Share of the least D of a copy's edits from which on it answers.
        keep_ratio: Share ρ of its entries that a copy may change.
        copy_size: Edits of a copy.
        merged_copies: Copies that are merged.
        bound: Largest change of an entry.
        density: Share of entries that TIES keeps.
        seed: The s-th copy draws its entries from seed + s.
        routes_by: What is largest in the copy that answers: D, or its ``ratio`` to the least D of
            the copy's edits.
        long_prompt: Tokens of a prompt from which on D is the largest distance of a token, not
            their mean; never if None.
    """

    fields: ClassVar[tuple[str, ...]] = ("changes", "distances")
    changes: Tensor
    distances: Tensor

    def __init__(
        self,
        module: str,
        shape: Sequence[int],
        stack: StackKind = "decoder",
        activation: str = "silu",
        act_ratio: float = 0.88,
        keep_ratio: float = 0.2,
        copy_size: int = 500,
        merged_copies: int = 2,
        bound: float = 1.0,
        density: float = 0.53,
        seed: int = 0,
        routes_by: RoutesBy = "distance",
        long_prompt: int | None = None,
    ) -> None:
        super().__init__(
            module=module,
            shape=list(shape),
            stack=stack,
            activation=activation,
            act_ratio=act_ratio,
            keep_ratio=keep_ratio,
            copy_size=copy_size,
            merged_copies=merged_copies,
            bound=bound,
            density=density,
            seed=seed,
            routes_by=routes_by,
            # Memories that were saved before it was one have no such setting.
            **({} if long_prompt is None else {"long_prompt": long_prompt}),
        )
        self._masks: dict[int, Tensor] = {}
        # Made of the entries, and so no part of the state.
        self.register_buffer("matrices", torch.zeros(0), persistent=False)
        self.register_buffer("thresholds", torch.zeros(0), persistent=False)

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The activation function a."""
        from transformers.activations import ACT2FN

        return cast("Callable[[Tensor], Tensor]", ACT2FN[self.settings["activation"]])

    def mask(self, copy: int) -> Tensor:
        """Indices of the entries that a copy may change, [Z] int64."""
        if copy not in self._masks:
            rows, columns = self.settings["shape"]
            seed = self.settings["seed"] + copy
            self._masks[copy] = mask_indices(rows * columns, self.settings["keep_ratio"], seed)
        return self._masks[copy].to(self._device())

    def copy_of(self, number: int) -> int:
        """The copy that an edit belongs to by its number."""
        return int(number // self.settings["copy_size"])

    def change_of(self, copy: int, entries: Mapping[str, MemoryEntry]) -> Tensor:
        """Δ of one copy, the sum of its edits' changes within the bound, [Z]."""
        total = torch.zeros(len(self.mask(copy)), device=self._device())
        for entry in entries.values():
            if self.copy_of(entry.notes["number"]) == copy:
                total = total + entry.tensors["changes"].to(total.device)
        bound = self.settings["bound"]
        return total.clamp(-bound, bound)

    def matrix(self, copy: int, change: Tensor) -> Tensor:
        """Δ as a matrix, [O, I], with a gradient to the change, [Z]."""
        rows, columns = self.settings["shape"]
        flat = torch.zeros(rows * columns, device=change.device)
        return flat.index_put((self.mask(copy),), change).reshape(rows, columns)

    @override
    def derive(self) -> None:
        entries = self.entries if len(self) else {}
        least: dict[int, float] = {}
        last = -1
        for entry in entries.values():
            copy, distance = self.copy_of(entry.notes["number"]), float(entry.tensors["distances"])
            least[copy] = min(distance, least.get(copy, distance))
            last = max(last, entry.notes["number"])
        groups: dict[int, list[int]] = {}
        together = self.settings["merged_copies"]
        for copy in sorted(least):
            group = copy // together
            is_full = last + 1 >= (group + 1) * together * self.settings["copy_size"]
            groups.setdefault(group if is_full else -1 - copy, []).append(copy)
        matrices, thresholds = [], []
        for copies in groups.values():
            own = torch.stack([self.matrix(c, self.change_of(c, entries)) for c in copies])
            matrices.append(own[0] if len(copies) == 1 else ties(own, self.settings["density"]))
            thresholds.append(self.settings["act_ratio"] * min(least[c] for c in copies))
        self.matrices = torch.stack(matrices) if matrices else torch.zeros(0)
        self.thresholds = torch.tensor(thresholds, device=self._device())

    @override
    def answer(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        router = self.router
        if self.is_off or (router.positions is None and router.route is None):
            return None
        rows = len(cast(Tensor, router.route if router.positions is None else router.positions))
        inputs = plain(args[0])
        inputs = inputs.reshape(rows, -1, inputs.shape[-1])
        outputs = output.reshape(rows, -1, output.shape[-1])
        if router.positions is not None:
            router.decide(self._route(inputs, outputs, cast(Tensor, router.prompt)))
        route = cast(Tensor, router.route)
        answered = outputs
        for copy in range(len(self.matrices)):
            hits = route == copy
            if bool(hits.any()):
                changed = outputs + (inputs.float() @ self.matrices[copy].T).to(outputs.dtype)
                answered = torch.where(hits[:, None, None], changed, answered)
        return None if answered is outputs else answered.reshape(output.shape)

    def _route(self, inputs: Tensor, outputs: Tensor, prompt: Tensor) -> Tensor:
        """The copy that answers each row, −1 where none does, [B]."""
        by_ratio = self.settings["routes_by"] == "ratio"
        found = []
        for matrix, threshold in zip(self.matrices, self.thresholds, strict=True):
            changed = outputs.float() + inputs.float() @ matrix.T
            distances = activation_distance(
                outputs, changed, prompt, self.activation, self.settings.get("long_prompt")
            )
            size = distances / threshold if by_ratio else distances
            found.append(torch.where(distances >= threshold, size, -1.0))
        largest = torch.stack(found).max(0)
        return torch.where(largest.values >= 0, largest.indices, -1)
