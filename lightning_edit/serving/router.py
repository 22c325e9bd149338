# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Which version answers a request, where several share the traffic."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

from lightning_edit.core.errors import ServerError

__all__ = ["check_shares", "choose"]


def choose(shares: Mapping[str, float], key: str) -> str | None:
    """The adapter that answers a request, by the hash of a key.

    The same key gets the same adapter in every process. When shares change, keys move only to
    adapters whose share grew or from those whose share fell (weighted rendezvous hashing).

    Args:
        shares: Name of each adapter to its share of the keys; what they lack of 1 is the base's.
        key: What stays together, such as the id of a user or of a conversation.

    Returns:
        The adapter's name; None for the base.

    Raises:
        ServerError: If a share is negative or not a number, or they come to more than 1.

    Examples:
        >>> choose({"facts-v1": 1.0}, "user 7")
        'facts-v1'
        >>> picks = [choose({"facts-v2": 0.25}, f"user {i}") for i in range(1000)]
        >>> 200 < picks.count("facts-v2") < 300, picks.count(None) > 700
        (True, True)

    References:
        Weighted distributed hash tables, doi 10.1145/1073970.1074008.
    """
    check_shares(shares)
    rest = max(0.0, 1.0 - sum(shares.values()))
    weights: list[tuple[str | None, float]] = [*shares.items(), (None, rest if rest > 1e-9 else 0)]
    best = -math.inf
    chosen: str | None = None
    for name, weight in weights:
        if weight > 0:
            digest = hashlib.sha256(
                f"{name or ''}\0{key}".encode("utf-8", "surrogatepass")
            ).digest()
            # 48 bits, so that the quotient is a float below 1.
            score = -weight / math.log((int.from_bytes(digest[:6], "big") + 0.5) / 2**48)
            if score > best:
                best, chosen = score, name
    return chosen


def check_shares(shares: Mapping[str, float]) -> None:
    """Checks that shares are numbers from 0 to 1 that come to 1 at most.

    Raises:
        ServerError: If they are not.
    """
    if not all(0.0 <= share <= 1.0 for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
        raise ServerError(
            "Shares are expected to lie between 0 and 1 and to come to 1 at most, but got "
            f"{', '.join(f'{name}: {share}' for name, share in shares.items())}."
        )
