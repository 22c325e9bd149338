# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The data module of edits: reads requests, chooses among them, and hands them to the Trainer."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from lightning_edit.checkpoints import PlainCheckpoints
from lightning_edit.core.errors import MissingDependencyError, RequestError
from lightning_edit.core.request import EditRequest, cases, check_requests
from lightning_edit.data.json import read_records, request_from_record
from lightning_edit.data.loader import RequestLoader, ResumableRequestLoader, requests_sha256
from lightning_edit.data.records import Record, without_nones

__all__ = ["EditDataModule"]


class EditDataModule(PlainCheckpoints, LightningDataModule):
    """Edit requests for the Trainer, written inline, or read from a file or a hub data set.

    A batch is a ``list[EditRequest]``. In ``fit`` every rank gets every request in the same order;
    a method that shares the work of a batch between ranks divides it itself. In ``validate``,
    ``test`` and ``predict`` the requests are dealt out to the data-parallel ranks, none twice; a
    rank that runs out before the others gets empty lists.

    A data set with records of its own overrides ``to_requests``, and ``read_records`` if
    records need each other; it never overrides ``setup`` or the loaders.

    Args:
        requests: The requests themselves.
        path: A ``.json``, ``.jsonl``, ``.yaml`` or ``.yml`` file of records.
        hub: Name of a data set on the Hugging Face hub, with ``@revision`` behind it to pin it, or
            a local folder; needs the extra ``data``.
        subset: Configuration of the hub data set, where it has several.
        split: Split of the hub data set.
        batch_size: Requests edited in one optimizer step.
        eval_batch_size: Requests in a batch of ``validate``, ``test`` and ``predict``; the requests
            of a case stay together, and count as one here and in what follows.
        limit: Keep this many requests; all of them when null.
        offset: Leave out this many requests first.
        ids: Keep the requests with these ids, in this order.
        seed: Shuffle once with this seed, before ``offset`` and ``limit``; no shuffling when null.
        skip_invalid: Leave out records that make no valid request, or contradict or repeat an
            earlier one, with a warning that counts them, instead of raising.

    Raises:
        RequestError: If more than one source or a number out of range is given; from ``setup``, if
            the source cannot be read, a record is invalid, an id is unknown, nothing is left, or
            two chosen requests contradict each other.

    Examples:
        >>> request = EditRequest("The capital of France is", "France", "Rome", id="france")
        >>> data = EditDataModule(requests=[request], batch_size=4)
        >>> [[request.id for request in batch] for batch in data.train_dataloader()]
        [['france']]
    """

    #: Where requests come from that neither a file nor a hub has, in words.
    own_source: ClassVar[str] = "the given list"

    def __init__(
        self,
        requests: list[EditRequest] | None = None,
        path: str | None = None,
        hub: str | None = None,
        subset: str | None = None,
        split: str = "train",
        batch_size: int = 1,
        eval_batch_size: int = 16,
        limit: int | None = None,
        offset: int = 0,
        ids: list[str] | None = None,
        seed: int | None = None,
        skip_invalid: bool = False,
    ) -> None:
        super().__init__()
        given = {"requests": requests, "path": path, "hub": hub}
        sources = [name for name, value in given.items() if value is not None]
        if len(sources) > 1:
            raise RequestError(
                "`requests`, `path` and `hub` exclude each other, but got "
                f"{' and '.join(sources)}. Give one of them."
            )
        for name, number, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("limit", limit, 1),
            ("offset", offset, 0),
        ):
            if number is not None and number < least:
                raise RequestError(f"`{name}` is expected to be at least {least}, got {number}.")
        self.path = path
        self.hub = hub
        self.subset = subset
        self.split = split
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.limit = limit
        self.offset = offset
        self.ids = ids
        self.seed = seed
        self.skip_invalid = skip_invalid
        self._given = requests
        self._requests: list[EditRequest] | None = None

    @property
    def source(self) -> str:
        """Where the requests come from, in words."""
        return self.path or self.hub or self.own_source

    @property
    def requests(self) -> list[EditRequest]:
        """The chosen requests; read at the first use."""
        if self._requests is None:
            valid = self._read_requests() if self._given is None else list(self._given)
            if self.skip_invalid:
                valid = self._without_conflicts(valid)
            chosen = self._choose(valid)
            try:
                check_requests(chosen, in_turn=True)
            except RequestError as error:
                hint = " Or set `skip_invalid`, which keeps the first of such requests."
                raise RequestError(f"{self.source}: {error}{hint if chosen else ''}") from None
            self._requests = chosen
        return self._requests

    @property
    def old_requests(self) -> list[EditRequest]:
        """For each request one that asks for the old answer: the knowledge to forget.

        Portability probes are left out, for their answers follow from the new fact.

        Raises:
            RequestError: If a request does not name its old answer.
        """
        return [replace(request.reversed(), portability=()) for request in self.requests]

    @property
    def requests_sha256(self) -> str:
        """Hash of the chosen requests in their order, in hexadecimal."""
        return requests_sha256(self.requests)

    def prepare_data(self) -> None:
        """Downloads a hub data set, on one process, into the cache of ``datasets``."""
        if self.hub is not None and self._requests is None:
            self._hub_records(self.hub)

    def setup(self, stage: str) -> None:
        """Reads, chooses and checks the requests, once.

        Args:
            stage: Which verb is about to run; the requests are the same for all.
        """
        _ = self.requests

    def read_records(self) -> list[tuple[str, Record]]:
        """Reads the records of the source, each with the words that name it in errors."""
        if self.path is not None:
            return read_records(self.path)
        if self.hub is not None:
            return self._hub_records(self.hub)
        raise RequestError(
            f"{type(self).__name__} has no requests. Give `path`, a file of records"
            + (", `hub` or `requests`." if type(self) is EditDataModule else ", or `hub`.")
        )

    def to_requests(self, record: Record, where: str) -> list[EditRequest]:
        """Turns one record into its requests.

        Args:
            record: The record as plain JSON types.
            where: Names the file and record in errors.

        Raises:
            RequestError: If the record is malformed; the message names file, record and field.
        """
        return [request_from_record(record, where)]

    def train_dataloader(self) -> ResumableRequestLoader:
        """All requests, on every rank; resumes within an epoch."""
        return ResumableRequestLoader(self.requests, self.batch_size, self._batches_done)

    def old_dataloader(self) -> ResumableRequestLoader:
        """The old answers as ``fit`` has the new ones, on every rank: for forgetting first."""
        return ResumableRequestLoader(self.old_requests, self.batch_size, self._batches_done)

    def val_dataloader(self) -> RequestLoader:
        """This rank's share of the requests."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer else None
        # Counts data-parallel ranks only: ranks that hold parts of one tensor need the same batch.
        return RequestLoader(self.requests, self.eval_batch_size, **(kwargs or {}))

    def test_dataloader(self) -> RequestLoader:
        """This rank's share of the requests."""
        return self.val_dataloader()

    def predict_dataloader(self) -> RequestLoader:
        """This rank's share of the requests."""
        return self.val_dataloader()

    def _batches_done(self) -> int:
        if self.trainer is None:
            return 0
        # Processed counts a batch when its step is over, before the hooks that save checkpoints.
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.state_dict()
        done: int = progress["current"]["processed"]
        return done if done < self.trainer.num_training_batches else 0

    def _read_requests(self) -> list[EditRequest]:
        records = self.read_records()
        valid: list[EditRequest] = []
        errors: list[RequestError] = []
        for where, record in records:
            try:
                valid += self.to_requests(record, where)
            except RequestError as error:
                errors.append(error)
        if errors and not self.skip_invalid:
            raise RequestError(
                f"{len(errors)} of {len(records)} records of {self.source} make no valid request. "
                f"The first: {errors[0]} Mend them, or set `skip_invalid` to leave them out."
            )
        if errors:
            rank_zero_warn(
                f"Left out {len(errors)} of {len(records)} records of {self.source} that make no "
                f"valid request. The first: {errors[0]}"
            )
        return valid

    def _without_conflicts(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        kept: dict[str, EditRequest] = {}
        targets: dict[str, str] = {}
        for case in cases(requests):
            wanted = [(request.prompt.strip(), request.target_new.strip()) for request in case]
            is_apart = all(targets.get(prompt, new) == new for prompt, new in wanted)
            if is_apart and not any(request.id in kept for request in case):
                kept |= {request.id: request for request in case}
                targets |= dict(wanted)
        if dropped := len(requests) - len(kept):
            rank_zero_warn(
                f"Left out {dropped} of {len(requests)} requests of {self.source} that contradict "
                "an earlier one or repeat its id."
            )
        return list(kept.values())

    def _choose(self, requests: list[EditRequest]) -> list[EditRequest]:
        if self.ids is not None:
            by_id = {request.id: request for request in requests}
            for name in self.ids:
                if name not in by_id:
                    near = difflib.get_close_matches(name, by_id) or list(by_id)[:3]
                    raise RequestError(
                        f"`ids`: no request of {self.source} has the id {name!r}. "
                        f"Ids there are, for example: {', '.join(near)}."
                    )
            requests = [by_id[name] for name in self.ids]
        units = cases(requests)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(len(units), generator=generator).tolist()
            units = [units[i] for i in order]
        end = None if self.limit is None else self.offset + self.limit
        chosen = [request for unit in units[self.offset : end] for request in unit]
        if requests and not chosen:
            raise RequestError(
                f"`offset` is {self.offset}, but {self.source} has {len(units)} requests. "
                "Give a smaller offset."
            )
        return chosen

    def _hub_records(self, hub: str) -> list[tuple[str, Record]]:
        try:
            from datasets import load_dataset
        except ImportError:
            purpose = f"Reading the data set {hub!r} by its hub name"
            raise MissingDependencyError("datasets", "data", purpose) from None
        name, _, revision = hub.partition("@")
        rows = load_dataset(name, self.subset, split=self.split, revision=revision or None)
        return [(f"{name}[{i}]", without_nones(row)) for i, row in enumerate(rows)]
