# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Requests that experts which may be changed have no part in."""

# Shapes: E requests, M inputs of the edited projection.

from __future__ import annotations

from torch import Tensor

from lightning_edit.core.locator import MLPSite

__all__ = ["unreached"]


def unreached(site: MLPSite, keys: Tensor) -> dict[int, str]:
    """Which keys are of no expert that may be changed, and why nothing can be stored at them.

    Args:
        site: Where pairs are to be stored.
        keys: [E, M].

    Examples:
        >>> import torch
        >>> from lightning_edit.core.experts import ExpertSite
        >>> site = ExpertSite("down_proj", "mlp", 3, False, out_features=2, width=2, experts=2)
        >>> unreached(site.among([1]), torch.tensor([[1.0, 2.0, 0.0, 0.0]]))[0][:63]
        'in layer 3 the router sends its subject to the experts [0], non'
    """
    return {
        e: f"in layer {site.layer} the router sends its subject to the experts {site.picked(key)}, "
        "none of which `experts` names. Name one of them, or leave `experts` away."
        for e, key in enumerate(keys)
        if bool(key.any()) and not bool(site.kept(key).any())
    }
