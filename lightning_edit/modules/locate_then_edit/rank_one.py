# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""One pair after another into one matrix, as ROME and R-ROME store them."""

# Shapes: E requests, D hidden, M inputs of the edited projection.

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import EditError, LocatorError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.locator import MLPSite
from lightning_edit.core.request import EditRequest
from lightning_edit.modules.locate_then_edit.target_values import TargetValues

__all__ = ["RankOneChanges", "only_site"]

# Below this cosine of u and k the update is large and hits other keys: the collapse of ROME.
SMALL_DIVISOR = 0.1


def only_site(sites: Sequence[MLPSite], method: str) -> MLPSite:
    """The one matrix that a method edits.

    Raises:
        LocatorError: If there are several.
    """
    if len(sites) != 1:
        raise LocatorError(
            f"{method} edits one layer, but `layers` names {len(sites)}. Give one, or choose a "
            "method that spreads an edit over layers."
        )
    return sites[0]


class RankOneChanges:
    """Changes of one matrix, a term of rank one for each request.

    Args:
        site: The matrix.
        device: Where the model is.
    """

    def __init__(self, site: MLPSite, device: torch.device) -> None:
        self.site = site
        self._left = [torch.zeros(site.out_features, 0, device=device)]
        self._right = [torch.zeros(site.in_features, 0, device=device)]
        self._norms: list[float] = []

    def at(self, key: Tensor) -> Tensor:
        """What the terms so far add to the matrix's output at a key, [D]."""
        return torch.cat(self._left, 1) @ (torch.cat(self._right, 1).T @ key)

    def add(self, request: EditRequest, u: Tensor, v: Tensor, key: Tensor) -> None:
        """Adds the term of a request.

        Args:
            request: The request, for warnings.
            u: Left factor of ΔW = u vᵀ, [D, 1].
            v: Right factor, the direction of length one, [M, 1].
            key: The key at which the pair is stored, [M].
        """
        cosine = float(v[:, 0] @ key / torch.linalg.vector_norm(key))
        if abs(cosine) < SMALL_DIVISOR:
            rank_zero_warn(
                f"Request {request.id!r}: the update direction and the key have a cosine of "
                f"only {cosine:.3f}, so the update is large and may damage other facts. "
                "Add context templates, or edit another layer."
            )
        self._left.append(u)
        self._right.append(v)
        self._norms.append(float(torch.linalg.vector_norm(u)))

    def edit(
        self, requests: Sequence[EditRequest], found: TargetValues, failed: Mapping[str, str]
    ) -> WeightDelta:
        """The edit of all requests.

        Args:
            requests: Those whose terms were added, in order.
            found: Their target values.
            failed: Reasons of the others, by id.

        Raises:
            EditError: If it is not finite.
        """
        u, v = torch.cat(self._left, 1), torch.cat(self._right, 1)
        if not bool(torch.isfinite(u).all() and torch.isfinite(v).all()):
            raise EditError("The update is not finite. Nothing was written.")
        rows: list[RequestFigures] = [
            {
                "id": request.id,
                "norm": self._norms[e],
                "searched_loss": found.losses[e][-1]["total"],
                "steps": len(found.losses[e]),
                "searched_p_target": found.probabilities[e],
            }
            for e, request in enumerate(requests)
        ]
        edit = WeightDelta({self.site.name: self.site.change(u, v)})
        edit.details = {
            "requests": rows,
            "failed": dict(failed),
            "target_values": found,
            "layer": self.site.layer,
        }
        return edit
