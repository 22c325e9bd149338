# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Batches of requests for the Trainer: the same on every rank, shared out, or resumed midway.

Requests are short texts, so ``torch.utils.data.DataLoader`` has nothing to add (no workers, no
collation, no pinning) and much to get wrong here: Lightning would give every rank other requests to
edit, repeat requests in evaluation until the ranks are even, and after a crash begin the epoch
again at its first request. It leaves an iterable of another type alone, and keeps the state of one
that has ``state_dict``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal, TypedDict

from lightning_edit.core.errors import RequestError
from lightning_edit.core.request import EditRequest, cases

__all__ = ["RequestLoader", "ResumableRequestLoader", "requests_sha256"]


class RequestLoader:
    """Yields lists of requests; with several replicas, each gets every n-th case.

    A request without a ``case`` is one by itself; the requests of a case stay together.

    All replicas run the same number of batches. Requests are never repeated to get there: a replica
    that has run out gets empty lists, so that five requests on two replicas count as five, and a
    replica without any request still takes part in collective calls.

    Args:
        requests: The requests, in order.
        batch_size: Cases in a batch; the last one may hold fewer.
        num_replicas: Number of processes that share the cases.
        rank: Which of them this is, from 0.

    Examples:
        >>> from lightning_edit.core.request import EditRequest
        >>> requests = [EditRequest(f"{name} lives in", name, "Rome", id=name) for name in "ABC"]
        >>> for rank in range(2):
        ...     loader = RequestLoader(requests, batch_size=1, num_replicas=2, rank=rank)
        ...     [[request.id for request in batch] for batch in loader]
        [['A'], ['C']]
        [['B'], []]
    """

    #: Whether the requests of a case stay together, and count as one.
    keeps_cases: ClassVar[bool] = True

    def __init__(
        self,
        requests: Sequence[EditRequest],
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.batch_size = batch_size
        units = cases(requests) if self.keeps_cases else [[request] for request in requests]
        self._mine = units[rank::num_replicas]
        self.requests = [request for unit in self._mine for request in unit]
        self._most = len(units[::num_replicas])

    def __len__(self) -> int:
        return -(-self._most // self.batch_size)

    def __iter__(self) -> Iterator[list[EditRequest]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> list[EditRequest]:
        if not 0 <= index < len(self):
            raise IndexError(f"Batch {index} of {len(self)}.")
        part = self._mine[index * self.batch_size : (index + 1) * self.batch_size]
        return [request for unit in part for request in unit]


class LoaderState(TypedDict):
    """How far an epoch has come, and over which requests.

    Args:
        batches: Batches that were carried out.
        batch_size: Requests in each.
        requests_sha256: Hash of all requests in their order.
    """

    batches: int
    batch_size: int
    requests_sha256: str


class ResumableRequestLoader(RequestLoader):
    """Yields every request on every rank, and resumes an interrupted epoch where it stopped.

    Lightning stores the state of this loader with its fit loop. The state counts the batches that
    were *carried out*, not those handed out: a run that dies within an edit repeats that edit.

    Args:
        requests: The requests, in order.
        batch_size: Requests in a batch.
        progress: Says how many batches of the current epoch are done.
    """

    keeps_cases = False  # an optimizer step is of requests

    def __init__(
        self,
        requests: Sequence[EditRequest],
        batch_size: int,
        progress: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(requests, batch_size)
        self._progress = progress
        self._start = 0
        self._mark: str | None = None

    def __iter__(self) -> Iterator[list[EditRequest]]:
        start, self._start = self._start, 0
        return (self[i] for i in range(start, len(self)))

    def state_dict(self) -> LoaderState:
        """The position in the epoch, and a mark of the requests it refers to."""
        # Kept, for a run may save after each of ten thousand edits.
        self._mark = self._mark or requests_sha256(self.requests)
        return {
            "batches": self._progress(),
            "batch_size": self.batch_size,
            "requests_sha256": self._mark,
        }

    def load_state_dict(self, state_dict: LoaderState) -> None:
        """Lets the next pass begin at the stored position.

        Raises:
            RequestError: If the position is within an epoch over other requests or batches.
        """
        start = state_dict["batches"]
        if start:
            now = self.state_dict()
            marks: dict[Literal["batch_size", "requests_sha256"], str] = {
                "batch_size": "`batch_size`",
                "requests_sha256": "requests",
            }
            for name, what in marks.items():
                if now[name] != state_dict[name]:
                    raise RequestError(
                        f"The checkpoint stopped after {start} batches of an epoch whose {what} "
                        f"differ from those given now ({state_dict[name]} then, {now[name]} now). "
                        "Resume with the same requests, order and `batch_size`; to go on with "
                        "others, start from the edited model instead of the checkpoint."
                    )
        self._start = start


def requests_sha256(requests: Sequence[EditRequest]) -> str:
    """SHA-256 over the edits of a sequence of requests, in order, in hexadecimal.

    Examples:
        >>> requests_sha256([])[:8]
        'e3b0c442'
    """
    return hashlib.sha256("".join(request.sha256() for request in requests).encode()).hexdigest()
