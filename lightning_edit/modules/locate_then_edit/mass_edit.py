# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What mass editors share: target values spread over several layers, each solved in closed form."""

# Shapes: E requests, T templates, D hidden, M inputs of the edited projection.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.change import LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import EditError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.locator import ModelTree, WeightSite
from lightning_edit.functional.least_squares import factorize
from lightning_edit.modules.locate_then_edit.base import LocateModule
from lightning_edit.modules.locate_then_edit.target_values import TargetValues
from lightning_edit.modules.session import write_for_now
from lightning_edit.passes.key_pass import KeyPass
from lightning_edit.passes.tail import Place

__all__ = ["MassEditModule"]

KEY_ROWS = 512  # rows whose keys are taken at once


class MassEditModule(LocateModule):
    """Base of editors that write all requests of a batch at once, over several layers.

    A subclass says by ``solve`` how the pairs of one layer are written, and by ``place``
    what the target values are values of. Layers are edited from below; each takes its share of what
    the last one still lacks, so that all of them together give the target values.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. When None, five up to a quarter
            of the depth.
        aligned: Take keys and target values of every batch from the unedited model, each layer
            adding an equal part, and keep the keys of earlier batches. Batches written one after
            another then give the change of their union at once (arXiv 2605.26670).
        kwargs: Arguments of every locate-then-edit method, such as ``context_templates``, and of
            every editor; see ``LocateModule``.

    References:
        Mass-Editing Memory in a Transformer, arXiv 2210.07229, section 4.3.
    """

    groups_contexts: ClassVar[bool] = True
    #: What takes target values at the last edited layer.
    place: ClassVar[Place] = "block"

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        aligned: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        self.settings = replace(self.settings, place=self.place)
        self.aligned = aligned
        self._factors: dict[int, Tensor] = {}

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        count = len(tree.blocks)
        last = int(count * 0.25 + 0.5)  # 8 of 32; the papers edit five layers up to there
        return list(range(max(0, last - 4), min(last, count - 1) + 1))

    @abstractmethod
    def solve(
        self, site: WeightSite, keys: Tensor, residuals: Tensor
    ) -> tuple[LowRank, dict[str, Tensor]]:
        """Writes the pairs of one layer.

        Args:
            site: The matrix to change.
            keys: Averaged over templates, [E, M] float32.
            residuals: What to add to the layer's output at each key, [E, D] float32.

        Returns:
            The change as u vᵀ of shape [D, M], and figures of each request by name, [E] each.
        """

    def portion(self, lacking: Tensor, layers: int) -> Tensor:
        """What the next layer takes of what is lacking, [E, D], when so many are still to come."""
        return lacking / layers

    def carry(self, batch: EditBatch, keys: dict[int, Tensor]) -> dict[str, Tensor]:
        """What later edits need of this one, once it is committed; see ``carried``.

        Args:
            batch: The requests, already written into the model.
            keys: Layer to keys before the edit, [E, M].
        """
        return self.remember(keys) if self.aligned else {}

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        sites = self.sites(self.tree)
        with self.base_weights() if self.aligned else nullcontext():
            batch, found, failed = self.find_target_values(batch, sites[-1].layer)
            passes = self._passes(batch, sites)
            if self.aligned:
                asked = {site.layer: self._ask(passes, site.layer) for site in sites}
        changes: dict[str, LowRank] = {}
        keys: dict[int, Tensor] = {}
        residuals: dict[int, Tensor] = {}
        figures: dict[int, dict[str, Tensor]] = {}
        for i, site in enumerate(sites):
            layer = site.layer
            key, hidden = asked[layer] if self.aligned else self._ask(passes, layer)
            keys[layer] = self.mean_keys(key)
            lacking = found.values - hidden[:, 0]
            if self.aligned:
                written = self._written_at(site, keys[layer])
                residuals[layer] = self.portion(lacking, len(sites)) - written
            else:
                residuals[layer] = self.portion(lacking, len(sites) - i)
            pairs, figures[layer] = self.solve(site, keys[layer], residuals[layer])
            if not bool(torch.isfinite(pairs.u).all() and torch.isfinite(pairs.v).all()):
                raise EditError(f"The update of layer {layer} is not finite. Nothing was written.")
            change = LowRank(pairs.v, pairs.u) if site.transposed else pairs
            changes[site.name] = change
            # Layers above see what this one has got.
            write_for_now(self.model, WeightDelta({site.name: change}))
        edit = WeightDelta(changes)
        edit.carried = self.carry(batch, keys)
        edit.details = {
            "requests": [
                self._row(batch, found, e, changes, figures) for e in range(len(batch.requests))
            ],
            "failed": failed,
            "target_values": found,
            "keys": keys,
            "residuals": residuals,
            "figures": figures,
        }
        return edit

    def _passes(self, batch: EditBatch, sites: Sequence[WeightSite]) -> list[KeyPass]:
        """The rows of a batch, few enough at a time for their attention to fit in memory."""
        layers = [site.layer for site in sites]
        rows = self.key_rows(batch)
        parts = [rows[start : start + KEY_ROWS] for start in range(0, len(rows), KEY_ROWS)]
        return [
            KeyPass.capture(self.tree, layers, part, self.tokens.pad_id, self.place)
            for part in parts
        ]

    def _ask(self, passes: Sequence[KeyPass], layer: int) -> tuple[Tensor, Tensor]:
        """Keys of a layer, and what the last layer makes of the rows; [E, T, X] each."""
        keys, outputs = zip(*(one.keys(layer) for one in passes), strict=True)
        templates = len(self.templates)
        key, output = torch.cat(keys), torch.cat(outputs)
        return (
            key.reshape(-1, templates, key.shape[-1]),
            output.reshape(-1, templates, output.shape[-1]),
        )

    def layer_keys(self, batch: EditBatch) -> dict[int, Tensor]:
        """Keys of a batch in the model as it stands, [E, M] of each layer."""
        sites = self.sites(self.tree)
        passes = self._passes(batch, sites)
        return {site.layer: self.mean_keys(self._ask(passes, site.layer)[0]) for site in sites}

    def _written_at(self, site: WeightSite, keys: Tensor) -> Tensor:
        """What committed edits add to a layer's output at some keys, [E, D]."""
        change = self.delta.changes.get(site.name)
        if change is None:
            return torch.zeros(len(keys), site.out_features, device=keys.device)
        return keys @ site.orient(self.delta.dense(site.name)).to(keys.device).T

    def remember(self, keys: dict[int, Tensor]) -> dict[str, Tensor]:
        """Keys of earlier edits with new ones, as tensors to be carried.

        While there are few, they are kept as they are, which makes for small systems; from half of
        their dimensions on, the sum of their outer products takes less.

        Args:
            keys: Layer to keys, [E, M].
        """
        carried: dict[str, Tensor] = {}
        for layer, new in keys.items():
            old, gram = self.remembered(layer)
            joined = torch.cat([old, new.T], 1)
            if gram is None and joined.shape[1] <= joined.shape[0] // 2:
                carried[f"keys/{layer}"] = joined
            else:
                whole = joined.double() @ joined.double().T
                carried[f"gram/{layer}"] = whole if gram is None else whole + gram
                # Tensors of earlier edits stay in a sum of edits until they are replaced.
                carried[f"keys/{layer}"] = joined[:, :0]
        return carried

    def remembered(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Keys of earlier edits, [M, n], and the sum of outer products of still earlier ones."""
        width = self.tree.mlp_out(layer).in_features
        device = next(self.model.parameters()).device
        empty = torch.zeros(width, 0, device=device)
        return self.carried.get(f"keys/{layer}", empty), self.carried.get(f"gram/{layer}")

    def key_rows(self, batch: EditBatch) -> list[list[int]]:
        """Token ids of each request in each template, cut behind the subject's last token."""
        rows = []
        for request in batch.requests:
            for template in self.templates:
                prefix = template.removesuffix("{}")
                ids, last = self.tokens.subject_last(request.prompt, request.subject, prefix)
                rows.append(list(ids[: last + 1]))
        return rows

    def _row(
        self,
        batch: EditBatch,
        found: TargetValues,
        e: int,
        changes: dict[str, LowRank],
        figures: dict[int, dict[str, Tensor]],
    ) -> RequestFigures:
        per_layer: Sequence[dict[str, Tensor]] = list(figures.values())
        names = per_layer[0] if per_layer else {}
        shares: Any = {
            name: sum(float(layer[name][e]) for layer in per_layer) / len(per_layer)
            for name in names
        }
        row: RequestFigures = {
            "id": batch.requests[e].id,
            "norm": sum(_column_norm(change, e) ** 2 for change in changes.values()) ** 0.5,
            "loss": found.losses[e][-1]["total"],
            "steps": len(found.losses[e]),
            "p_target": found.probabilities[e],
        }
        row.update(shares)
        return row

    def factor(self, layer: int) -> Tensor:
        """Cholesky factor of the layer's second moment, [M, M] float64, made once."""
        if layer not in self._factors:
            self._factors[layer] = factorize(self.second_moment(layer))
        return self._factors[layer].to(self.model.device)


def _column_norm(change: LowRank, e: int) -> float:
    """‖Δ‖ of one request's part of a low-rank change."""
    norms = (torch.linalg.vector_norm(part[:, e]) for part in (change.u, change.v))
    return float(torch.stack(list(norms)).prod())
