# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Changes of weights: low-rank or dense, with algebra, exact undo and a file format."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_edit.core.change import Change, LowRank, add_changes, dense_change, tensors_of
from lightning_edit.core.committed import Batches
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import ArtifactError, EditError, some_of
from lightning_edit.core.figures import EditDetails
from lightning_edit.core.hashing import tensor_hash
from lightning_edit.core.lora import LoRAFactors, to_lora
from lightning_edit.core.plain_model import check_weight
from lightning_edit.core.provenance import Provenance
from lightning_edit.core.schema import DTYPES, check_factors
from lightning_edit.core.sharding import (
    everywhere,
    local_change,
    local_shard,
    shard_like,
    whole_tensor,
)
from lightning_edit.core.storage import (
    CONFIG,
    TENSORS,
    EditConfig,
    EntryRecord,
    ParameterRecord,
    provenance_of,
    save_artifact,
)
from lightning_edit.core.wrappers import plain_parameters

__all__ = ["WeightDelta"]

_Place = tuple[int, torch.Size, torch.dtype]

# Below this share of the wanted change the rounding of the weights' dtype is worth a warning.
SURVIVAL_WARNING = 0.9


class WeightDelta(Edit):
    """Named changes of a model's parameters: ``W' = W + Δ``.

    Weights are always written as the sum of the untouched original and the whole change, in
    float32 and rounded once to the weight's dtype, so that many small edits do not pile up
    rounding errors. The originals are kept, since ``W + Δ − Δ`` is not ``W`` in floating point.

    Args:
        changes: Parameter name to ``LowRank`` factors or a dense float32 tensor of the
            parameter's shape.
        provenance: Where the edit comes from.
        originals: Parameter name to the tensor that stood there before, needed to undo an edit
            that was applied elsewhere.
        hashes: Parameter name to the hashes of the original and the edited tensor.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> before = layer.weight.clone()
        >>> delta = WeightDelta({"weight": LowRank(torch.ones(2, 1), torch.ones(3, 1))})
        >>> with delta.applied(layer):
        ...     bool((layer.weight - before).allclose(torch.ones(2, 3)))
        True
        >>> torch.equal(layer.weight, before)
        True
        >>> round((2 * delta).norm() / delta.norm(), 6)
        2.0
    """

    artifact_kind: ClassVar[str] = "weight_delta"

    def __init__(
        self,
        changes: Mapping[str, Change],
        provenance: Provenance | None = None,
        originals: Mapping[str, Tensor] | None = None,
        hashes: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.changes: dict[str, Change] = dict(changes)
        self.provenance = provenance or Provenance()
        self.originals: dict[str, Tensor] = dict(originals or {})
        self.hashes: dict[str, tuple[str, str]] = dict(hashes or {})
        self.details: EditDetails = {}
        self.carried: dict[str, Tensor] = {}
        self.batches: Batches = ()

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{name}: rank {change.rank}" if isinstance(change, LowRank) else f"{name}: dense"
            for name, change in self.changes.items()
        )
        return f"WeightDelta({parts})"

    def __len__(self) -> int:
        return len(self.changes)

    # -- algebra ---------------------------------------------------------------------------

    @classmethod
    def between(
        cls,
        base: Mapping[str, Tensor],
        tuned: Mapping[str, Tensor],
        provenance: Provenance | None = None,
    ) -> Self:
        """The task vector ``tuned − base`` over all floating tensors that differ.

        Tied weights count once, by their first name.

        Args:
            base: Name to tensor before.
            tuned: Name to tensor after; names that ``base`` lacks are an error.
            provenance: Where the edit comes from.

        Raises:
            ArtifactError: If ``base`` lacks a tensor, shapes differ, or weights that are tied in
                ``base`` are not tied in ``tuned`` and differ there.

        References:
            Editing Models with Task Arithmetic, arXiv 2212.04089, section 2.
        """
        changes: dict[str, Change] = {}
        originals: dict[str, Tensor] = {}
        seen: set[_Place] = set()
        first: dict[_Place, tuple[str, Tensor]] = {}
        for name, after in tuned.items():
            before = base.get(name)
            if before is None or before.shape != after.shape:
                raise ArtifactError(
                    f"The tensor `{name}` of the tuned model has no counterpart of the shape "
                    f"{list(after.shape)} in the base. Compare two models of one architecture."
                )
            other, same = first.setdefault(_place(before), (name, after))
            if same is not after and not torch.equal(same, after):
                raise ArtifactError(
                    f"`{other}` and `{name}` are one tensor in the base and two in the tuned "
                    "model, so that no change of the base makes it the other. Untie the base's "
                    "weights, or tie those of the tuned model."
                )
            # A state dict names tied weights twice; a model's parameters, the first time only.
            place = _place(after)
            if after.is_floating_point() and place not in seen and not torch.equal(before, after):
                seen.add(place)
                changes[name] = after.detach().float() - before.detach().float()
                originals[name] = before.detach().clone()
        return cls(changes, provenance, originals)

    def __add__(self, other: Self) -> Self:
        changes = dict(self.changes)
        for name, change in other.changes.items():
            changes[name] = add_changes(changes[name], change) if name in changes else change
        provenance = self.provenance.and_then(other.provenance)
        total = type(self)(changes, provenance, {**other.originals, **self.originals})
        total.carried = {**self.carried, **other.carried}
        total.batches = (*self.parts, *other.parts)
        return total

    def __mul__(self, factor: float) -> Self:
        changes: dict[str, Change] = {
            name: LowRank(change.u * factor, change.v)
            if isinstance(change, LowRank)
            else change * factor
            for name, change in self.changes.items()
        }
        scaled = type(self)(changes, self.provenance, self.originals)
        scaled.carried = dict(self.carried)
        return scaled

    __rmul__ = __mul__

    def __neg__(self) -> Self:
        return self * -1.0

    def __sub__(self, other: Self) -> Self:
        return self + -other

    def dense(self, name: str) -> Tensor:
        """The change of one parameter as a dense float32 tensor of its shape."""
        return dense_change(self.changes[name])

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Factors and dense tensors by name."""
        yield from self.state_dict().items()

    def norm(self) -> float:
        """Frobenius norm over all changed parameters."""
        return math.hypot(*self.norms().values())

    def norms(self) -> dict[str, float]:
        """Frobenius norm of the change of each parameter, in float32 as published figures are."""
        return {
            name: change.norm()
            if isinstance(change, LowRank)
            else float(torch.linalg.vector_norm(change))
            for name, change in self.changes.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the factors and dense tensors, without the originals."""
        return sum(t.nbytes for change in self.changes.values() for t in tensors_of(change))

    @property
    def keeps_originals(self) -> bool:
        """Whether it knows the tensors that it changes as they were."""
        return self.changes.keys() <= self.originals.keys()

    # -- on a model ------------------------------------------------------------------------

    def apply_(self, model: nn.Module, *, check: bool = True) -> None:
        """Adds the change to the model's weights, in place, keeping the originals.

        Args:
            model: Model whose parameters are named as in ``changes``.
            check: Compare the model's weights with the recorded base. Turn off only to add an
                edit to a model that differs from its base on purpose.

        Raises:
            ArtifactError: If a parameter is missing or has another shape, or the model is not
                the recorded base. Nothing has been written then.
        """
        parameters = self._parameters(model)
        if check:
            self.check_base(model)
        self.check_finite()
        originals = {name: p.detach().clone() for name, p in parameters.items()}
        known = self.originals, self.hashes
        try:
            self.write_(model, originals)
            self.originals = originals
            if known[1]:
                # Those in a file are of the model it was saved from, perhaps of another machine.
                self.hashes = {
                    name: (tensor_hash(originals[name]), tensor_hash(p))
                    for name, p in parameters.items()
                }
        except BaseException:  # an interruption, too
            _restore(parameters, originals)
            self.originals, self.hashes = known
            raise

    def write_(self, model: nn.Module, originals: Mapping[str, Tensor]) -> None:
        """Sets each changed parameter to original + change, without checks or copies.

        Args:
            model: Model to write into.
            originals: Parameter name to the untouched tensor.
        """
        parameters = self._parameters(model)
        with torch.no_grad():
            for name, parameter in parameters.items():
                change = local_change(parameter, self.changes[name])
                original = shard_like(parameter, originals[name])
                rounded = (original.float() + change).to(parameter.dtype)
                if not everywhere(parameter, _is_finite(rounded) or not _is_finite(original)):
                    raise EditError(
                        f"The edit would leave values in `{name}` that are not finite in "
                        f"{str(rounded.dtype).removeprefix('torch.')}: it is too large. Nothing "
                        "was written. Make it anew with smaller steps, or another precision."
                    )
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    _warn_of_rounding(name, original, rounded, change)
                local_shard(parameter).copy_(rounded)

    def check_targets(self, model: nn.Module, originals: Mapping[str, Tensor]) -> None:
        """Checks that the edit changes only parameters whose originals are kept.

        Raises:
            EditError: If it changes another.
        """
        unknown = set(self.changes) - set(originals)
        if unknown:
            raise EditError(
                f"The edit changes {some_of(sorted(unknown))}, which the editor did not "
                f"announce. Announced: {some_of(originals)}."
            )

    def reset_(self, model: nn.Module, originals: Mapping[str, Tensor]) -> None:
        """Sets every parameter whose original is given to original + change.

        Args:
            model: Model to write into.
            originals: Parameter name to the untouched tensor.
        """
        named = plain_parameters(model)
        with torch.no_grad():
            for name, original in originals.items():
                local_shard(named[name]).copy_(shard_like(named[name], original))
        self.write_(model, originals)

    def revert_(self, model: nn.Module) -> None:
        """Puts the originals back, bit for bit.

        Raises:
            ArtifactError: If the originals are not known, or the weights in the model are not
                those that this edit wrote. Nothing has been written then.
        """
        missing = [name for name in self.changes if name not in self.originals]
        if missing:
            raise ArtifactError(
                f"The originals of {some_of(missing)} were not kept, so the edit cannot be "
                "undone exactly. Load the base model again instead, or save edits with their "
                "originals (`save(folder, originals=True)`)."
            )
        parameters = self._parameters(model)
        for name, parameter in parameters.items():
            kept = self.originals[name]
            if self.wrote(name, parameter):
                continue
            dtypes = [str(t.dtype).removeprefix("torch.") for t in (parameter, kept)]
            raise ArtifactError(
                f"`{name}` in this model is not the tensor that this edit wrote: "
                + (
                    "the edit is not applied here, or another change came after it. Undo later "
                    "edits first."
                    if dtypes[0] == dtypes[1]
                    else f"it is {dtypes[0]}, and the edit wrote {dtypes[1]}. Load the model with "
                    f"dtype {dtypes[1]}."
                )
            )
        _restore(parameters, self.originals)

    @contextmanager
    def kept(self, model: nn.Module, *, always: bool = True) -> Iterator[None]:
        """Context manager: puts what the edit changes back after it, or only if it fails."""
        parameters = self._parameters(model)
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            try:
                yield
                if not always:
                    parameters = {}
            finally:
                _restore(parameters, kept)
        finally:
            _restore(parameters, kept)  # if the first time was interrupted before it began

    def wrote(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is what this edit made of the original that it keeps.

        Args:
            name: Name of a parameter that the edit changes.
            tensor: The parameter's values.
        """
        _, edited = self.hashes.get(name, ("", ""))
        if edited and tensor_hash(tensor) == edited:
            return True
        return self.made(name, tensor, self.originals[name])

    def made(self, name: str, tensor: Tensor, original: Tensor) -> bool:
        """Whether a tensor is original + change, or the original where nothing is changed.

        On another machine or device the terms of u vᵀ are summed in another order; in float32 that
        changes a sum of R terms by less than 2 R ε |u| |v|ᵀ, and original + change by a rounding
        more, which is allowed for.

        Args:
            name: Name of a parameter.
            tensor: The parameter's values; where it is sharded, every process must call this.
            original: What stood there before.
        """
        if tensor.dtype != original.dtype:
            return False
        found = local_shard(tensor)
        before = shard_like(tensor, original)
        if name not in self.changes:
            return everywhere(tensor, torch.equal(found, before))
        change = self.changes[name]
        wanted = before.float() + local_change(tensor, change)
        slack = torch.zeros((), device=found.device)
        if isinstance(change, LowRank):
            terms = local_change(tensor, LowRank(change.u.abs(), change.v.abs()))
            slack = 2 * change.rank * terms + (terms > 0) * (before.float().abs() + terms)
            slack = slack * torch.finfo(torch.float32).eps
        # Rounding keeps order.
        least, most = (wanted - slack).to(found.dtype), (wanted + slack).to(found.dtype)
        return everywhere(tensor, bool(((least <= found) & (found <= most)).all()))

    def seal(self, model: nn.Module, originals: Mapping[str, Tensor]) -> Self:
        """Records the originals and the hashes of an edit that stands in the model.

        Args:
            model: The edited model.
            originals: Parameter name to the tensor that stood there before.
        """
        parameters = self._parameters(model)
        kept = {n: whole_tensor(originals[n]).detach().cpu().clone() for n in self.changes}
        hashes = {n: (tensor_hash(kept[n]), tensor_hash(p)) for n, p in parameters.items()}
        return type(self)(self.changes, self.provenance, kept, hashes)

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        named = plain_parameters(model)
        for name, change in self.changes.items():
            if name not in named:
                raise ArtifactError(
                    f"The model has no parameter `{name}`, which this edit changes. It was made "
                    f"for {self.provenance.base.id or 'another model'}."
                )
            check_weight(name, named[name], type(model).__name__)
            if named[name].shape != change.shape:
                raise ArtifactError(
                    f"`{name}` has the shape {list(named[name].shape)} in this model, but the edit "
                    f"is for {list(change.shape)}. It was made for "
                    f"{self.provenance.base.id or 'another model'}."
                )
        return {name: named[name] for name in self.changes}

    def to_lora(self, model: nn.Module, rank: int | None = None) -> dict[str, LoRAFactors]:
        """The edit as LoRA factors; see ``lightning_edit.core.lora.to_lora``.

        Args:
            model: A model with the modules that the edit changes; its weights are not read.
            rank: Largest rank of a module; all that is there when None.
        """
        return to_lora(self.changes, model, rank, base=self.provenance.base.id)

    # -- checkpoints -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Factors and dense tensors by name."""
        tensors: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            if isinstance(change, LowRank):  # of a sum, without the room that it has to grow
                tensors[f"{name}.u"] = change.u.contiguous()
                tensors[f"{name}.v"] = change.v.contiguous()
            else:
                tensors[f"{name}.dense"] = change
        return tensors

    def recorded(self) -> tuple[dict[str, Tensor], list[EntryRecord]]:
        """Factors and dense tensors by name; there are no entries."""
        return self.state_dict(), []

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], model: nn.Module) -> Self:
        """The edit out of ``state_dict``, on the devices of the model's parameters."""
        # Lightning moves what a torch optimizer keeps to the device of the model, but not this.
        named = plain_parameters(model)
        tensors = {
            key: tensor.to(named[key.rpartition(".")[0]].device) for key, tensor in state.items()
        }
        return cls(
            {
                name: tensors[f"{name}.dense"]
                if f"{name}.dense" in tensors
                else LowRank(tensors[f"{name}.u"], tensors[f"{name}.v"])
                for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors)
            }
        )

    # -- files -----------------------------------------------------------------------------

    def save(self, folder: str | Path, *, originals: bool = True) -> Path:
        """Writes ``delta_config.json``, ``delta.safetensors`` and ``README.md``.

        Args:
            folder: Created if need be; files of an earlier edit in it are replaced.
            originals: Keep the original tensors with the edit, so that it can be undone exactly
                in a model that was saved after editing.

        Returns:
            The folder.
        """
        tensors = self.state_dict()
        if originals:
            kept = [name for name in self.changes if name in self.originals]
            tensors |= {f"{name}.original": self.originals[name] for name in kept}
        parameters: dict[str, ParameterRecord] = {
            name: {
                "shape": list(change.shape),
                "rank": change.rank if isinstance(change, LowRank) else None,
                "original_sha256": self.hashes.get(name, ("", ""))[0],
                "edited_sha256": self.hashes.get(name, ("", ""))[1],
            }
            for name, change in self.changes.items()
        }
        return save_artifact(self, Path(folder), tensors, {"parameters": parameters})

    @classmethod
    def from_files(cls, folder: Path, config: EditConfig, tensors: Mapping[str, Tensor]) -> Self:
        """The changes, with originals and hashes where they were saved.

        Raises:
            ArtifactError: If description and tensors do not belong together.
        """
        parameters = config["parameters"]
        changes = {
            name: _read_change(name, entry, tensors, folder) for name, entry in parameters.items()
        }
        kept = {n: tensors[f"{n}.original"] for n in parameters if f"{n}.original" in tensors}
        for name, original in kept.items():
            if original.shape != changes[name].shape or original.dtype not in DTYPES:
                raise ArtifactError(
                    f"`{folder / TENSORS}`: the original of `{name}` is {original.dtype} "
                    f"{list(original.shape)}, but the change is {list(changes[name].shape)}. The "
                    "files do not belong together."
                )
        return cls(
            changes,
            provenance_of(config),
            kept,
            {
                name: (entry.get("original_sha256", ""), entry["edited_sha256"])
                for name, entry in parameters.items()
                if entry.get("edited_sha256")
            },
        )


def _read_change(
    name: str, entry: ParameterRecord, tensors: Mapping[str, Tensor], folder: Path
) -> Change:
    change: Change
    if f"{name}.dense" in tensors:
        change = tensors[f"{name}.dense"]
    elif f"{name}.u" in tensors and f"{name}.v" in tensors:
        u, v = tensors[f"{name}.u"], tensors[f"{name}.v"]
        try:
            check_factors(name, u, v, entry.get("rank"))
        except ValueError as error:
            raise ArtifactError(
                f"`{folder / TENSORS}` is damaged: {error}. Make the edit again."
            ) from None
        change = LowRank(u, v)
    else:
        raise ArtifactError(f"`{folder / TENSORS}` lacks the change of `{name}`.")
    if any(tensor.dtype not in DTYPES for tensor in tensors_of(change)):
        raise ArtifactError(
            f"`{folder / TENSORS}`: the change of `{name}` is {tensors_of(change)[0].dtype}, but "
            "changes are float32. Make the edit again."
        )
    if list(change.shape) != entry.get("shape"):
        raise ArtifactError(
            f"`{folder}`: `{CONFIG}` gives `{name}` the shape {entry.get('shape')}, but "
            f"`{TENSORS}` has {list(change.shape)}. The files do not belong together."
        )
    return change


def _place(tensor: Tensor) -> _Place:
    """Where a tensor lies, which tied weights have in common."""
    return tensor.data_ptr() or id(tensor), tensor.shape, tensor.dtype


def _restore(parameters: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> None:
    try:
        _copy_all_(parameters, originals)
    except BaseException:  # an interruption, too, finds all of them put back
        _copy_all_(parameters, originals)
        raise


@torch.no_grad()
def _copy_all_(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        local_shard(parameter).copy_(shard_like(parameter, values[name]))


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(local_shard(tensor)).all())


def _warn_of_rounding(name: str, original: Tensor, rounded: Tensor, change: Tensor) -> None:
    wanted = torch.linalg.vector_norm(change)
    written = torch.sum((rounded.float() - original.float()) * change) / wanted.clamp_min(1e-30)
    survived = float(written / wanted.clamp_min(1e-30))
    if wanted > 0 and survived < SURVIVAL_WARNING:
        warnings.warn(
            f"Only {survived:.0%} of the change of `{name}` survives rounding to "
            f"{str(rounded.dtype).removeprefix('torch.')}. Load the model with dtype float32.",
            UserWarning,
            stacklevel=3,
        )
