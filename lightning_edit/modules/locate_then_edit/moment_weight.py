# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""λ of MEMIT and PMET: how many keys the second moment counts for."""

from __future__ import annotations

from torch import Tensor

from lightning_edit.functional.least_squares import ridge_for_share

__all__ = ["check_weight", "moment_ridge"]


def check_weight(moment_weight: float | None, written_share: float) -> None:
    """Checks the two arguments by which λ is given or chosen.

    Raises:
        ValueError: If λ is negative or the share is not between 0 and 1.
    """
    if moment_weight is not None and moment_weight < 0:
        raise ValueError(f"`moment_weight` is expected to be at least 0, but got {moment_weight}.")
    if not 0 < written_share < 1:
        raise ValueError(
            f"`written_share` is expected to be between 0 and 1, but got {written_share}."
        )


def moment_ridge(
    moment_weight: float | None, written_share: float, strengths: Tensor, earlier: float | None
) -> float:
    """λ of a layer.

    Args:
        moment_weight: λ, if it is given.
        written_share: Share of its pair that the median request of the first batch is to get.
        strengths: Strengths of the requests' keys, [E]; see ``key_strengths``.
        earlier: λ that the first edit chose, if there was one.
    """
    if moment_weight is not None:
        return moment_weight
    return ridge_for_share(strengths, written_share) if earlier is None else earlier
