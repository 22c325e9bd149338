# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Where an edit comes from: the method, the base model and the requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Self

from lightning_edit.core.request import EditRequest

__all__ = ["BaseModelInfo", "Provenance", "utc_now"]


@dataclass(frozen=True)
class BaseModelInfo:
    """Which weights an edit belongs to.

    Args:
        id: Hub id or folder the model was loaded from.
        revision: Revision of a hub model.
        dtype: Name of the weights' dtype, such as ``float32``.
        sha256: Hash of all weights before the edit, as ``core.hashing.weight_hash`` makes it.
        parameters: Number of parameters.
    """

    id: str = ""
    revision: str | None = None
    dtype: str = ""
    sha256: str = ""
    parameters: int = 0


@dataclass(frozen=True)
class Provenance:
    """Where an edit comes from: written beside it, never read to compute anything.

    Args:
        method: Name of the editor, such as ``ROME``.
        paper: Address of the paper that describes the method.
        settings: The editor's hyper-parameters, as JSON types.
        base: The model that was edited.
        request_ids: Ids of the requests that the edit answers, in order.
        requests: Those of them whose texts are known, without probes.
        created: When the edit was made, in UTC, in the form of ISO 8601. It makes no difference
            where two are compared.
    """

    method: str = ""
    paper: str = ""
    settings: dict[str, object] = field(default_factory=dict)
    base: BaseModelInfo = field(default_factory=BaseModelInfo)
    request_ids: tuple[str, ...] = ()
    requests: tuple[EditRequest, ...] = ()
    created: str = field(default="", compare=False)

    def answering(self, request_ids: Iterable[str], requests: Mapping[str, EditRequest]) -> Self:
        """This one with what an edit answers, made now.

        Args:
            request_ids: Ids of the requests, in order.
            requests: What is known of them, by id.
        """
        ids = tuple(request_ids)
        facts = tuple(requests[name].fact() for name in ids if name in requests)
        return replace(self, request_ids=ids, requests=facts, created=utc_now())

    def holding(self, request_ids: Iterable[str], base: BaseModelInfo) -> Self:
        """This one with other requests and another base; of the requests it knows what it knew."""
        known = {request.id: request for request in self.requests}
        ids = tuple(request_ids)
        facts = tuple(known[name] for name in ids if name in known)
        return replace(self, base=base, request_ids=ids, requests=facts)

    def and_then(self, other: Self) -> Self:
        """Where the sum of this edit and another comes from."""
        if set(self.request_ids).isdisjoint(other.request_ids):  # most often, and at less cost
            return replace(
                self,
                request_ids=(*self.request_ids, *dict.fromkeys(other.request_ids)),
                requests=self.requests + other.requests,
            )
        ids = dict.fromkeys((*self.request_ids, *other.request_ids))
        facts = {request.id: request for request in (*self.requests, *other.requests)}
        return replace(
            self,
            request_ids=tuple(ids),
            requests=tuple(facts[name] for name in ids if name in facts),
        )


def utc_now() -> str:
    """The time as ISO 8601 writes it, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
