# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""One row an edit and probe: what was asked, and what the model made of it before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.request import EditRequest
from lightning_edit.evaluation.evaluator import ScoredProbe

__all__ = ["COLUMNS", "CellRow", "probe_rows"]


class CellRow(TypedDict):
    """A probe of a request, before and after the edits.

    Args:
        cell: Key of the cell.
        request_id: The request.
        position: Place of the request in the order of editing, from 0.
        edits: How many edits were in the model when it was measured.
        is_final: Whether that was all of them; else it is a point of the curve of a sequence.
        metric: ``reliability``, ``generality``, ``locality`` or ``portability``.
        kind: Kind of the probe; empty for reliability and generality.
        probe: Number of the probe in its metric, from 0.
        prompt: What was asked.
        answers: Right answers.
        text_before: Continuation by the unedited model.
        text: Continuation by the edited one.
        teacher_forced_before: Share of the answer's tokens that the unedited model predicts.
        teacher_forced: The same of the edited one.
        autoregressive_before: Whether the unedited model's continuation gives the answer.
        autoregressive: The same of the edited one.
        nll_new_before: Mean NLL of the new answer's tokens before, in nats.
        nll_new: The same after.
        nll_old_before: Mean NLL of the old answer's tokens before, in nats.
        nll_old: The same after.
        seconds: Of the request's edit; an equal share where several are one edit.
        took: Whether the edited model gave the new answer right after the edit, token by token.
        failed: Why the method failed on the request; empty where it did not.
    """

    cell: str
    request_id: str
    position: int
    edits: int
    is_final: bool
    metric: str
    kind: str
    probe: int
    prompt: str
    answers: list[str]
    text_before: str
    text: str
    teacher_forced_before: float | None
    teacher_forced: float | None
    autoregressive_before: bool | None
    autoregressive: bool | None
    nll_new_before: float | None
    nll_new: float | None
    nll_old_before: float | None
    nll_old: float | None
    seconds: float | None
    took: bool | None
    failed: str


#: Names of all columns, in order.
COLUMNS = tuple(CellRow.__annotations__)


def probe_rows(
    cell: str,
    order: Sequence[EditRequest],
    before: Iterable[ScoredProbe],
    after: Iterable[ScoredProbe],
    figures: Iterable[RequestFigures],
    edits: Mapping[str, int],
    *,
    is_final: bool = True,
) -> list[CellRow]:
    """Rows of probes that were measured, in their order.

    Args:
        cell: Key of the cell.
        order: All requests in the order of editing.
        before: Scores by the unedited model.
        after: Scores of the same probes by the edited one.
        figures: What the edits tell of themselves.
        edits: Id of each request to how many edits were in the model.
        is_final: Whether all edits of a sequence were.
    """
    position = {request.id: i for i, request in enumerate(order)}
    told = {row["id"]: row for row in figures}
    seen: Counter[tuple[str, str]] = Counter()
    rows: list[CellRow] = []
    for old, new in zip(before, after, strict=True):
        own = told.get(new.request_id, RequestFigures())
        place = (new.request_id, new.metric)
        rows.append(
            CellRow(
                cell=cell,
                request_id=new.request_id,
                position=position[new.request_id],
                edits=edits[new.request_id],
                is_final=is_final,
                metric=new.metric,
                kind=new.kind,
                probe=seen[place],
                prompt=new.prompt,
                answers=list(new.answers),
                text_before=old.text,
                text=new.text,
                teacher_forced_before=old.teacher_forced,
                teacher_forced=new.teacher_forced,
                autoregressive_before=old.autoregressive,
                autoregressive=new.autoregressive,
                nll_new_before=old.nll_new,
                nll_new=new.nll_new,
                nll_old_before=old.nll_old,
                nll_old=new.nll_old,
                seconds=own.get("seconds"),
                took=own.get("took"),
                failed=own.get("failed", ""),
            )
        )
        seen[place] += 1
    return rows
