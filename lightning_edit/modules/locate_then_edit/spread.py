# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Spreading target values over several layers, each of which stores its part of them."""

# Shapes: E requests, T templates, D hidden, M inputs of the edited projection, N keys with those of
# earlier edits.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.change import Change, LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import EditError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.locator import MLPSite, ModelTree
from lightning_edit.modules.locate_then_edit.earlier_edits import EarlierEdits
from lightning_edit.modules.locate_then_edit.reach import unreached
from lightning_edit.modules.session import write_for_now

if TYPE_CHECKING:
    from lightning_edit.modules.locate_then_edit.base import LocateModule

__all__ = ["LayerPairs", "Spread", "lower_layers"]


def lower_layers(tree: ModelTree) -> list[int]:
    """The layers that are edited by default: five up to a quarter of the depth."""
    count = len(tree.blocks)
    last = int(count * 0.25 + 0.5)  # 8 of 32; the papers edit five layers up to there
    return list(range(max(0, last - 4), min(last, count - 1) + 1))


@dataclass(frozen=True)
class LayerPairs:
    """Keys of a batch at a layer, and what it is to return at them.

    Args:
        site: The matrix to change.
        keys: K, averaged over templates, [E, M] float32.
        lacking: What the last edited layer lacks of the target values, [E, D] float32.
        layers: Among how many layers that is shared out: this one and those above, or all if
            batches are aligned.
        written: What committed edits add to this layer's output at the keys, [E, D], if batches
            are aligned; else 0.
        earlier: What earlier edits left here.
    """

    site: MLPSite
    keys: Tensor
    lacking: Tensor
    layers: int
    written: Tensor
    earlier: EarlierEdits

    @property
    def layer(self) -> int:
        """Index of the layer."""
        return self.site.layer

    @property
    def all_keys(self) -> Tensor:
        """A: keys of earlier edits, as far as they are kept, then those of the batch, [M, N]."""
        return self.earlier.joined(self.keys)


class Spread:
    """A batch on its way into several layers: iterate to get the pairs of each, from below.

    Each layer is asked once those below it have been written by ``write``, and takes its share of
    what the last one still lacks, so that all of them together give the target values.

    Args:
        editor: The editor; its ``settings.place`` says what the target values are values of.
        batch: Requests, whose target values are searched at once.
        aligned: Take keys and target values from the unedited model, each layer adding an equal
            part (arXiv 2605.26670).

    References:
        Mass-Editing Memory in a Transformer, arXiv 2210.07229, section 4.3.
    """

    def __init__(self, editor: LocateModule, batch: EditBatch, *, aligned: bool) -> None:
        self._editor = editor
        self.sites = editor.sites(editor.tree)
        with editor.target.base_weights() if aligned else nullcontext():
            #: The requests that have target values, and these.
            self.batch, self.found, self._failed = editor.find_target_values(
                batch, self.sites[-1].layer
            )
            self._passes = editor.key_passes(self.batch)
            asked = [self._passes.keys(site.layer) for site in self.sites] if aligned else None
        self._unedited = asked
        #: Keys of each layer, [E, M].
        self.keys: dict[int, Tensor] = {}
        self._residuals: dict[int, Tensor] = {}
        self._shares: dict[int, Tensor] = {}
        self._changes: dict[str, LowRank] = {}

    def __iter__(self) -> Iterator[LayerPairs]:
        carried = self._editor.carried
        requests = self.batch.requests
        for i, site in enumerate(self.sites):
            if self._unedited is None:
                keys, outputs = self._passes.keys(site.layer)
            else:
                keys, outputs = self._unedited[i]
            key = self.keys[site.layer] = site.kept(self._editor.mean_keys(keys))
            for e, why in unreached(site, keys[:, 0]).items():
                raise EditError(f"Request {requests[e].id!r} cannot be spread over layers: {why}")
            yield LayerPairs(
                site,
                key,
                self.found.values - outputs[:, 0],
                len(self.sites) - (i if self._unedited is None else 0),
                self._written_at(site, key),
                EarlierEdits.unpack(carried, site.layer),
            )

    def write(
        self, pairs: LayerPairs, residuals: Tensor, u: Tensor, v: Tensor, share: Tensor
    ) -> None:
        """Writes a layer for now, so that layers above see what it has got.

        Args:
            pairs: What the layer was to store.
            residuals: R, what was added to its output at each key, [E, D].
            u: Left factor of ΔW = u vᵀ, [D, E].
            v: Right factor, [M, E].
            share: Share of its residual that each request gets if it is alone, [E].

        Raises:
            EditError: If the change is not finite.
        """
        if not bool(torch.isfinite(u).all() and torch.isfinite(v).all()):
            raise EditError(
                f"The update of layer {pairs.layer} is not finite. Nothing was written."
            )
        change = pairs.site.change(u, v)
        self._changes[pairs.site.name] = change
        self._residuals[pairs.layer] = residuals
        self._shares[pairs.layer] = share
        write_for_now(self._editor.model, WeightDelta({pairs.site.name: change}))

    def edit(self, memories: Mapping[int, EarlierEdits]) -> WeightDelta:
        """The edit of all layers together, with what it leaves for later ones, by layer."""
        changes: dict[str, Change] = dict(self._changes)
        squares = [
            (_squares(change.u) * _squares(change.v)).tolist() for change in self._changes.values()
        ]
        shares = [share.tolist() for share in self._shares.values()]
        edit = WeightDelta(changes)
        for layer, memory in memories.items():
            edit.carried |= memory.pack(layer)
        edit.details = {
            "requests": [
                self._row(e, sum(own[e] for own in squares) ** 0.5, [own[e] for own in shares])
                for e in range(len(self.batch.requests))
            ],
            "failed": self._failed,
            "target_values": self.found,
            "keys": self.keys,
            "residuals": self._residuals,
            "figures": {layer: {"written_share": s} for layer, s in self._shares.items()},
        }
        return edit

    def _written_at(self, site: MLPSite, keys: Tensor) -> Tensor:
        """What committed edits add to a layer's output at some keys, [E, D]."""
        delta = self._editor.delta
        if self._unedited is None or site.name not in delta.changes:
            return keys.new_zeros(len(keys), site.out_features)
        return keys @ site.matrix(delta.dense(site.name)).to(keys.device).T

    def _row(self, e: int, norm: float, shares: Sequence[float]) -> RequestFigures:
        return {
            "id": self.batch.requests[e].id,
            "norm": norm,
            "searched_loss": self.found.losses[e][-1]["total"],
            "steps": len(self.found.losses[e]),
            "searched_p_target": self.found.probabilities[e],
            "written_share": sum(shares) / len(shares),
        }


def _squares(factor: Tensor) -> Tensor:
    """Squared norm of each term of a factor, [R], whatever the shape before it."""
    return factor.flatten(0, -2).square().sum(0)
