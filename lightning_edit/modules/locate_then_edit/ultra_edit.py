# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""UltraEdit: lifelong editing by normalized gradients and one ridge regression."""

# Shapes: N target tokens of all requests, I inputs and O outputs of an edited projection.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_edit.core.batch import IGNORE_INDEX, EditBatch
from lightning_edit.core.change import Change, LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import EditError
from lightning_edit.core.figures import EditDetails
from lightning_edit.core.locator import ModelTree, WeightSite
from lightning_edit.core.projections import projection_sites
from lightning_edit.functional.ultra_edit import (
    Normalizer,
    normalize,
    ridge_update,
    update_normalizer,
)
from lightning_edit.modules.base import EditModule
from lightning_edit.passes.gradient_passes import (
    GradientPass,
    gradient_passes,
)

__all__ = ["UltraEdit"]

# Of the depth: the upper part, as in the paper; the ends are where the default model holds most.
FIRST, LAST = 0.75, 0.97


class UltraEdit(EditModule):
    """Lifelong editing without subjects, search or training: one gradient and one regression.

    At every target token the inputs h of the edited projections and the gradients g at their
    outputs are taken in one pass. A running normalizer, shared by the projections of one shape and
    carried over all edits of a run, turns them into h̃ and g̃. Then V = −lr ‖h̃‖² g̃ and
    ΔWᵀ = (Hᵀ H + λ I)⁻¹ Hᵀ V, where H are the inputs as they were. No gradient of a weight is ever
    made.

    Gradients are of the mean loss over all target tokens of an edit, however its requests are put
    into passes.

    What is carried is the normalizer alone. It advances when an edit is committed: an edit that is
    only computed, or applied by hand, changes no later one.

    Give it many requests at once (the paper: 100), since the normalizer knows only what it has
    seen. The size of V goes by the sizes of the model and of its activations, so ``lr`` must be
    found for each model: the paper has 1e-6 for models of 7 billion parameters, and the preset of
    the default model 1e-4.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers to edit; negative ones count from the end. Those from 0.75 to 0.97 of the
            depth if None.
        modules: Projections to edit in each layer: ``mlp_in`` (gate and up projection where the
            MLP is gated), ``mlp_out``, ``attention_in``, ``attention_out``, or a projection's own
            name, such as ``up_proj``. A mapping gives each of them layers of its own. ``mlp_in``
            if None.
        lr: Scale of the update.
        ridge: λ of the regression.
        micro_batch_size: Requests in a pass, which bounds memory; they are sorted by length.
        eps: ε of the normalizer.
        biased_variance: Let the normalizer add variances as the authors' code does; its figures
            then depend on ``micro_batch_size``.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].

    References:
        UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models,
        arXiv 2505.14679, section 4.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2505.14679"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        modules: list[str] | dict[str, list[int]] | None = None,
        lr: float = 1e-6,
        ridge: float = 1.0,
        micro_batch_size: int = 10,
        eps: float = torch.finfo(torch.float32).eps,
        biased_variance: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        for name, value in (("lr", lr), ("ridge", ridge), ("eps", eps)):
            if not value > 0:
                raise ValueError(f"`{name}` is expected to be above 0, but got {value}.")
        if micro_batch_size < 1:
            raise ValueError(
                f"`micro_batch_size` is expected to be at least 1, but got {micro_batch_size}."
            )
        if isinstance(modules, Mapping) and layers is not None:
            raise ValueError(
                "`modules` gives each projection its layers, and `layers` gives others. Leave "
                "`layers` out, or list the projections only."
            )
        self.projections = modules if modules is not None else ["mlp_in"]
        self.lr = lr
        self.ridge = ridge
        self.micro_batch_size = micro_batch_size
        self.eps = eps
        self.biased_variance = biased_variance

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        last = len(tree.blocks) - 1
        return list(range(min(round(FIRST * last), last), round(LAST * last) + 1))

    def sites(self, tree: ModelTree) -> list[WeightSite]:
        """The projections to edit, in the order of the forward pass, each once.

        Raises:
            LocatorError: If a layer does not exist or has no such projection.
        """
        return projection_sites(tree, self.projections, self.layers, self.default_layers)

    @override
    def edited_names(self, tree: ModelTree) -> list[str]:
        return [site.name for site in self.sites(tree)]

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        sites = self.sites(self.tree)
        tokens = int((batch.labels != IGNORE_INDEX).sum())
        passes, order = gradient_passes(self.tree, sites, batch, self.micro_batch_size, tokens)
        normalizers = self._normalizers(sites, passes)
        changes: dict[str, Change] = {}
        found: dict[str, tuple[Tensor, ...]] = {}
        for site in sites:
            keys, gradients = (  # h, [N, I], and g, [N, O]
                torch.cat([one.taken[site.name][i] for one in passes])[order] for i in range(2)
            )
            rows = normalize(
                torch.cat([keys, gradients], 1), normalizers[_shape_key(site)], self.eps
            )
            inputs, outputs = rows.tensor_split([site.in_features], 1)  # h̃ and g̃
            values = -self.lr * inputs.square().sum(1, keepdim=True) * outputs  # V, [N, O]
            change = ridge_update(keys, values, self.ridge)  # ΔW of (Hᵀ H + λ I)⁻¹ Hᵀ V
            if isinstance(change, Tensor):
                changes[site.name] = site.orient(change).contiguous()
            else:
                changes[site.name] = LowRank(*(change[::-1] if site.transposed else change))
            found[site.name] = (keys, gradients, inputs, outputs, values)
        edit = WeightDelta(changes)
        if not edit.norm() < float("inf"):
            raise EditError("The update is not finite. Nothing was written. Lower `lr`.")
        edit.carried = _packed(normalizers)
        edit.details = self._details(batch, edit, passes, found)
        return edit

    def _normalizers(
        self, sites: Sequence[WeightSite], passes: Sequence[GradientPass]
    ) -> dict[str, Normalizer]:
        """What earlier edits left, with the rows of this one, by the shape of the projections.

        Raises:
            EditError: If there are too few rows for a variance.
        """
        normalizers = _unpacked(self.carried, sites)
        for one in passes:
            for site in sites:
                rows = torch.cat(one.taken[site.name], 1)
                if self.biased_variance and len(rows) < 2:
                    raise EditError(
                        "A pass has a single target token, which has no variance, as "
                        "`biased_variance` would have it. Turn that off, or raise "
                        "`micro_batch_size` or the number of requests."
                    )
                key = _shape_key(site)
                normalizers[key] = update_normalizer(
                    normalizers.get(key), rows, biased_variance=self.biased_variance
                )
        if any(int(normalizer.total) < 2 for normalizer in normalizers.values()):
            raise EditError(
                "The first edit has a single target token in a single projection, from which "
                "nothing can be normalized. Give more requests at once, or edit more projections."
            )
        return normalizers

    def _details(
        self,
        batch: EditBatch,
        edit: WeightDelta,
        passes: Sequence[GradientPass],
        found: Mapping[str, tuple[Tensor, ...]],
    ) -> EditDetails:
        """Figures of each request, and tensors of each projection."""
        norm = edit.norm()
        losses = {e: x for one in passes for e, x in zip(one.chosen, one.losses, strict=True)}
        return {
            "keys": {name: tensors[0] for name, tensors in found.items()},
            "gradients": {name: tensors[1] for name, tensors in found.items()},
            "normalized_keys": {name: tensors[2] for name, tensors in found.items()},
            "normalized_gradients": {name: tensors[3] for name, tensors in found.items()},
            "values": {name: tensors[4] for name, tensors in found.items()},
            "requests": [
                {
                    "id": request.id,
                    "searched_loss": losses[e],
                    "steps": 1,
                    "norm": norm,
                }
                for e, request in enumerate(batch.requests)
            ],
        }


def _shape_key(site: WeightSite) -> str:
    return f"normalizer.{site.out_features}x{site.in_features}"


def _packed(normalizers: Mapping[str, Normalizer]) -> dict[str, Tensor]:
    """Normalizers as tensors by name, for an edit to carry."""
    return {
        f"{key}.{name}": tensor
        for key, normalizer in normalizers.items()
        for name, tensor in normalizer._asdict().items()
    }


def _unpacked(carried: Mapping[str, Tensor], sites: Sequence[WeightSite]) -> dict[str, Normalizer]:
    """The normalizers that an edit carries for some projections; none before the first edit."""
    return {
        key: Normalizer(*(carried[f"{key}.{name}"] for name in Normalizer._fields))
        for key in dict.fromkeys(map(_shape_key, sites))
        if f"{key}.total" in carried
    }
