# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""R-ROME: ROME without its collapse."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

from torch import Tensor
from typing_extensions import override

from lightning_edit.modules.locate_then_edit.rank_one import RankOneModule
from lightning_edit.modules.locate_then_edit.target_values import TargetValues

__all__ = ["RROME"]

KeyKind = Literal["averaged", "prompt"]


class RROME(RankOneModule):
    """ROME with one and the same key throughout, which keeps its divisor from vanishing.

    ROME takes the direction from averaged keys and divides by its product with the bare prompt's
    key; where the two differ much, the update explodes. Here both are k:
    ΔW = (v* − W k) uᵀ / (u · k), u = C⁻¹ k, so that the divisor kᵀ C⁻¹ k is always positive.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: The layer to edit; negative ones count from the end. A sixth of the way up if None.
        key: k is ``averaged`` over context templates, or that of the bare ``prompt``.
        kwargs: Arguments of every locate-then-edit method, such as ``context_templates``, and of
            every editor; see ``LocateModule``.

    Raises:
        ValueError: If there is no such kind of key.

    References:
        Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing,
        arXiv 2403.07175, section 4.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.07175"

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        key: KeyKind = "averaged",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, **kwargs)
        if key not in get_args(KeyKind):
            raise ValueError(f"`key` is expected to be 'averaged' or 'prompt', but got {key!r}.")
        self.key = key

    @override
    def pair(self, found: TargetValues, e: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.key == "prompt":
            return found.keys[e, 0], found.keys[e, 0], found.deltas[e]
        key = self.mean_keys(found.keys[e])
        return key, key, found.values[e] - self.mean_keys(found.outputs[e])
