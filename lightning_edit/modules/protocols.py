# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""How ``test`` measures edits: each case by itself, a batch at once, or all after one another.

A request without a ``case`` is one by itself.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Generic, Literal

import torch
from typing_extensions import override

from lightning_edit.core.errors import EditError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.request import EditRequest, cases
from lightning_edit.evaluation.evaluator import Evaluation
from lightning_edit.modules.fitting import edit_or_go_on, request_rows
from lightning_edit.modules.sharded import counts
from lightning_edit.optim import E

if TYPE_CHECKING:
    from lightning_edit.modules.base import EditModule

__all__ = [
    "Batch",
    "EditProtocol",
    "Independent",
    "ProtocolName",
    "Sequential",
    "make_protocol",
    "texts_before_and_after",
]

ProtocolName = Literal["independent", "batch", "sequential"]


class EditProtocol(ABC, Generic[E]):
    """How edits are made and measured by ``test``, which leaves the model as it was."""

    @abstractmethod
    def measure(self, editor: EditModule[E], batch: list[EditRequest]) -> None:
        """Makes and measures the edits of a batch."""

    @abstractmethod
    def finish(self, editor: EditModule[E]) -> None:
        """Measures what could not be measured before, and puts the model back."""


class Independent(EditProtocol[E]):
    """Each case is edited, measured and taken out by itself; its edits are made one by one."""

    @override
    def measure(self, editor: EditModule[E], batch: list[EditRequest]) -> None:
        for case in cases(batch):
            if len(case) == 1:
                _measure_groups(editor, [case])
            else:
                _measure_in_turn(editor, case)

    @override
    def finish(self, editor: EditModule[E]) -> None:
        """Nothing: the model is back after each case."""


class Batch(EditProtocol[E]):
    """The requests of a batch are one edit."""

    @override
    def measure(self, editor: EditModule[E], batch: list[EditRequest]) -> None:
        _measure_groups(editor, [batch] if batch else [])

    @override
    def finish(self, editor: EditModule[E]) -> None:
        """Nothing: the model is back after each batch."""


class Sequential(EditProtocol[E]):
    """All requests are committed one after another, and then measured.

    Args:
        before: All that was committed before the test.
    """

    def __init__(self, before: E) -> None:
        self.before = before
        self._seen: list[tuple[list[EditRequest], Evaluation, list[RequestFigures]]] = []

    @override
    def measure(self, editor: EditModule[E], batch: list[EditRequest]) -> None:
        before = editor.unedited.known(batch)
        if before is None:
            with editor.base_weights():
                before = editor.evaluator.evaluate(batch)
        figures: list[RequestFigures] = []
        with torch.inference_mode(False):
            for request in batch:
                edit, rows = _made(editor, [request])
                editor.session.commit(edit)
                figures += rows
        self._seen.append((batch, before, figures))

    @override
    def finish(self, editor: EditModule[E]) -> None:
        for batch, before, figures in self._seen:
            after = editor.evaluator.evaluate(batch, before.baseline)
            after.update(editor.test_metrics)
            editor.measured.add(batch, before, after, figures)
        if self._seen:
            editor.edit_optimizer.rewind(self.before)


def texts_before_and_after(
    editor: EditModule[E], batch: Sequence[EditRequest]
) -> list[dict[str, str]]:
    """What the model goes on with after each prompt, unedited and edited.

    With edits committed, these are what is compared; without any, one of the batch.
    """
    if not batch:
        return []
    prompts = [request.prompt for request in batch]
    with editor.base_weights():
        before = editor.evaluator.continuations(prompts)
    if len(editor.delta):
        after = editor.evaluator.continuations(prompts)
    else:
        with editor.session.written(edit_or_go_on(editor, batch)):
            after = editor.evaluator.continuations(prompts)
    return [
        {"id": request.id, "prompt": request.prompt, "before": b, "after": a}
        for request, b, a in zip(batch, before, after, strict=True)
    ]


def make_protocol(editor: EditModule[E]) -> EditProtocol[E]:
    """The protocol that an editor is to be tested by.

    Raises:
        EditError: If several processes would each edit a model of their own, or something else
            than the editor wrote to the weights.
    """
    editor.target.check()
    name = editor.test_protocol
    if name != "independent" and editor.trainer.world_size > 1:
        raise EditError(
            f"`test_protocol={name!r}` edits one model with all requests, but "
            f"{editor.trainer.world_size} processes would each edit their own. Set "
            "`trainer.devices=1`, or `test_protocol='independent'`."
        )
    if name == "sequential":
        return Sequential(editor.delta)
    return Batch() if name == "batch" else Independent()


def _measure_groups(editor: EditModule[E], groups: Iterable[Sequence[EditRequest]]) -> None:
    for group in groups:
        # With edits in it, the model as it stands is what further ones are compared with.
        known = None if len(editor.delta) else editor.unedited.known(group)
        before = known or editor.evaluator.evaluate(group)
        edit, figures = _made(editor, group)
        with editor.session.written(edit):
            after = editor.evaluator.evaluate(group, before.baseline)
        if counts(editor):
            after.update(editor.test_metrics)
            editor.measured.add(group, before, after, figures)


def _measure_in_turn(editor: EditModule[E], case: list[EditRequest]) -> None:
    """Makes the edits of a case one after another, and measures all that are made after each."""
    at_first = editor.delta
    known = None if len(at_first) else editor.unedited.known(case)
    before = after = known or editor.evaluator.evaluate(case)
    figures: list[RequestFigures] = []
    try:
        for made, request in enumerate(case, start=1):
            with torch.inference_mode(False):
                edit, rows = _made(editor, [request])
                editor.session.commit(edit)
            figures += rows
            after = editor.evaluator.evaluate(case[:made], before.baseline)
            if made < len(case) and counts(editor):
                pairs = zip(before.probes, after.probes, strict=False)  # of the first requests
                editor.measured.between += [(made, old, new) for old, new in pairs]
    finally:
        editor.edit_optimizer.rewind(at_first)
    if counts(editor):
        after.update(editor.test_metrics)
        editor.measured.add(case, before, after, figures)


def _made(editor: EditModule[E], group: Sequence[EditRequest]) -> tuple[E, list[RequestFigures]]:
    """An edit of a group of requests, and what it tells of each."""
    began = time.perf_counter()
    edit = edit_or_go_on(editor, group)
    ids = [request.id for request in group]
    return edit, request_rows(edit, ids, time.perf_counter() - began)
