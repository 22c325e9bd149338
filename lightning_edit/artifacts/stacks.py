# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Several saved edits of weights in one model, and how one of them is taken out of the middle."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, cast

import torch
from torch import Tensor, nn

from lightning_edit.artifacts.folders import manifest_of
from lightning_edit.core.change import LowRank, tensors_of
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.storage import read_config

__all__ = ["Applied", "Stack", "applied_to", "record_of"]


class Applied(TypedDict):
    """What the list of a model's files says of an edit in it."""

    #: Folder of the saved edit, seen from that of the model.
    folder: str
    tensors_sha256: str


def record_of(edits: Iterable[Path], folder: Path) -> list[Applied]:
    """What a model folder keeps of the saved edits that are in the model.

    Args:
        edits: Folders of the edits, in order.
        folder: That of the model.
    """
    return [
        {
            "folder": Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix(),
            "tensors_sha256": read_config(path).get("tensors_sha256", ""),
        }
        for path in edits
    ]


def applied_to(model: str) -> list[Path]:
    """Folders of the saved edits of weights that are in a model, in the order of their applying.

    Args:
        model: Name of the model; of one that is no folder written here nothing is known. Neither
            is it of an edit that lies elsewhere by now, or was made anew.
    """
    folder = Path(model).expanduser()
    try:
        records = cast(list[Applied], manifest_of(folder)["edits"])
        found = [(folder / record["folder"], record["tensors_sha256"]) for record in records]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    left = []
    for path, digest in found:
        try:
            if read_config(path).get("tensors_sha256") == digest:
                left.append(Path(os.path.relpath(path.resolve())))
        except ArtifactError:
            continue
    return left


@dataclass
class Stack:
    """Edits of weights that stand in a model together, whichever came first.

    Each of them was rounded to the weights' number format when it was applied, so that the model is
    original + all changes up to that.

    Args:
        edit: The one to take out.
        others: Those that stay.
        model: The model.
    """

    edit: WeightDelta
    others: Sequence[WeightDelta]
    model: nn.Module
    #: What stood there before all of them, by the parameter's name; found by ``take_out``.
    roots: dict[str, Tensor] = field(default_factory=dict)
    #: Names of the parameters from which the change was subtracted, for want of the others.
    subtracted: list[str] = field(default_factory=list)

    @torch.no_grad()
    def take_out(self, *, check: bool) -> None:
        """Sets the weights to original + the other changes, rounded once.

        Args:
            check: Whether the edits must account for every weight that they change. Without it the
                change is subtracted where they do not, which is exact up to rounding.

        Raises:
            ArtifactError: If they do not, or the edit is not in the model. Nothing is written then.
        """
        values: dict[str, Tensor] = {}
        named = dict(self.model.named_parameters())
        edits = (self.edit, *self.others)
        for name in dict.fromkeys(name for edit in edits for name in edit.changes):
            if name not in named or named[name].shape != self._of(name)[0].changes[name].shape:
                raise ArtifactError(
                    f"The model has no parameter `{name}` of the shape that the edits change."
                )
            root = self._root(name, named[name])
            if root is not None:
                self.roots[name] = root
            if name not in self.edit.changes:
                continue
            parameter, others = named[name], [e for e in self.others if name in e.changes]
            kept = self.edit.originals.get(name)
            if kept is not None and self.edit.wrote(name, parameter):
                values[name] = kept
            elif root is not None:
                value = root.float()
                for change in (other.dense(name) for other in others):
                    value = value + change
                values[name] = value
            elif check:
                raise ArtifactError(
                    f"`{name}` in this model is not what the edit and {len(others)} other(s) make "
                    "of their originals: yet another edit is in it, or this one is not. Name the "
                    "folders of all edits that stay (`others`), or turn the check off "
                    "(`--no_check`) to subtract the change, which is exact up to rounding."
                )
            elif kept is not None and torch.equal(kept, parameter):
                raise ArtifactError(
                    f"`{name}` in this model is as it was before the edit, so that the edit is "
                    "not in it. Give the model that it was applied to."
                )
            else:
                values[name] = parameter.double() - self.edit.dense(name).double()
                self.subtracted.append(name)
        for name, value in values.items():
            named[name].copy_(value.to(named[name].dtype))

    def is_verified(self) -> bool:
        """Whether all but the edits is, bit for bit, what one of them was made of."""
        edits = (self.edit, *self.others)
        names = {name for edit in self.others for name in edit.changes}
        bases = {edit.provenance.base.sha256 for edit in edits} - {""}
        originals = {name: self.roots[name] for name in names if name in self.roots}
        return names == originals.keys() and weight_hash(self.model, originals) in bases

    def _of(self, name: str) -> list[WeightDelta]:
        return [edit for edit in (self.edit, *self.others) if name in edit.changes]

    def _root(self, name: str, parameter: Tensor) -> Tensor | None:
        """The original of an edit on which all of them come to what is in the model, if any."""
        edits = self._of(name)
        change = torch.zeros(parameter.shape)
        size = torch.zeros(parameter.shape)
        terms = 1
        for one in (edit.changes[name] for edit in edits):
            change = change + (one.dense() if isinstance(one, LowRank) else one)
            u, *v = (tensor.abs() for tensor in tensors_of(one))
            size = size + (u @ v[0].mT if v else u)
            terms += u.shape[-1] if v else 1
        best: tuple[float, Tensor] | None = None
        for root in (edit.originals[name] for edit in edits if name in edit.originals):
            # Each application rounds, and sums of products are those of another machine perhaps.
            unit = len(edits) * torch.finfo(parameter.dtype).eps
            unit += 2 * terms * torch.finfo(torch.float32).eps
            distance = (parameter.float() - root.float() - change).abs()
            if not bool((distance <= unit * (root.float().abs() + size)).all()):
                continue
            if best is None or float(distance.max()) < best[0]:
                best = float(distance.max()), root
        return None if best is None else best[1]
