# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What was asked for when an edit was made, so that it can be made again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

from lightning_edit.core.errors import EditError
from lightning_edit.core.request import EditRequest

__all__ = ["Batches", "RequestBatch", "batches_without", "narrowed", "requests_of"]


@dataclass(frozen=True)
class RequestBatch:
    """The requests that one edit was made of, those on which the method failed included.

    Args:
        requests: The requests, in order.
        pass_dtype: Number format of the forward passes under mixed precision, such as
            ``bfloat16``; that of the weights when empty.

    Examples:
        >>> batch = RequestBatch((EditRequest("The capital of {} is", "France", "Rome"),))
        >>> RequestBatch.from_dict(batch.to_dict()) == batch
        True
    """

    requests: tuple[EditRequest, ...]
    pass_dtype: str = ""

    @property
    def ids(self) -> set[str]:
        """Ids of the requests."""
        return {request.id for request in self.requests}

    def without(self, request_ids: Collection[str]) -> Self:
        """The batch without some requests."""
        left = tuple(r for r in self.requests if r.id not in request_ids)
        return replace(self, requests=left)

    def to_dict(self) -> dict[str, object]:
        """The batch as plain JSON types."""
        return {"requests": [r.to_dict() for r in self.requests], "pass_dtype": self.pass_dtype}

    @classmethod
    def from_dict(cls, record: Mapping[str, object]) -> Self:
        """Reads what ``to_dict`` gave.

        Raises:
            RequestError: If one of the requests is malformed.
        """
        records = cast("Sequence[Mapping[str, object]]", record["requests"])
        return cls(tuple(map(EditRequest.from_dict, records)), str(record["pass_dtype"]))


#: What each edit of a sum was made of, in order; None for one of which that is not known.
Batches = tuple[RequestBatch | None, ...]


def requests_of(batches: Batches) -> dict[str, EditRequest]:
    """The requests of batches by their id, the last one of each.

    Args:
        batches: The batches; those that are not known have none.
    """
    return {r.id: r for batch in batches if batch is not None for r in batch.requests}


def narrowed(batches: Batches, request_ids: Collection[str]) -> Batches:
    """Batches without some requests, but for those that are not known; none of them is empty.

    Args:
        batches: The batches.
        request_ids: Ids of the requests.
    """
    left = (batch and batch.without(request_ids) for batch in batches)
    return tuple(batch for batch in left if batch is None or batch.requests)


def batches_without(
    batches: Batches, committed: Collection[str], request_ids: Collection[str]
) -> list[RequestBatch]:
    """The batches that are left when requests are taken out, in order; none of them is empty.

    Args:
        batches: What was committed.
        committed: Ids of all requests that are in the model.
        request_ids: Ids of those to take out.

    Raises:
        EditError: If one of these is not in the model, or one of the batches is not known.
    """
    if unknown := [name for name in request_ids if name not in committed]:
        names = ", ".join(list(committed)[:5]) or "nothing"
        raise EditError(
            f"No request with the id {unknown[0]!r} is in the model. In it: {names}"
            + (", …" if len(committed) > 5 else "")
            + "; `delta.provenance.request_ids` lists all."
        )
    known = [batch for batch in batches if batch is not None]
    if len(known) < len(batches):
        raise EditError(
            f"Of {len(batches) - len(known)} of the {len(batches)} parts of what was committed it "
            "is not known what was asked for: they come from a checkpoint of an earlier version, "
            "or are edits that were scaled, added up or made by hand. Edits of weights stand on "
            "one another and have to be made again, so that single requests cannot be taken out "
            "of these. Begin with the unedited model, and edit it with the requests that are to "
            "stay."
        )
    return [batch for batch in narrowed(batches, request_ids) if batch is not None]
