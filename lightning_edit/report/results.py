# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a run of edits came to, as plain data: the one thing every writer of a report reads.

Everything is brought to JSON types on construction (see ``plain``), so that a report read back
equals the one that was written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Self, get_type_hints

from lightning_edit.core.errors import ArtifactError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["EditRow", "MetricRow", "ProbeRow", "RunReport", "plain"]


@dataclass(frozen=True)
class MetricRow:
    """One metric in one reading, before and after the edits.

    Args:
        before: Value on the unedited model; ``None`` where it was not measured.
        after: Value on the edited model; a value that is not finite becomes ``None``.
        n: Number of cases that the values are means of.
        ci: 95 % interval of ``after``.
    """

    before: float | None = None
    after: float | None = None
    n: int = 0
    ci: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", _finite(self.before))
        object.__setattr__(self, "after", _finite(self.after))
        if self.ci is not None:
            low, high = (_finite(bound) for bound in self.ci)
            object.__setattr__(self, "ci", None if low is None or high is None else (low, high))


@dataclass(frozen=True)
class ProbeRow:
    """One question beside an edit, with the model's answers before and after.

    Args:
        role: ``generality``, ``locality`` or ``portability``.
        kind: Kind of the probe within its role, such as ``neighborhood`` or ``one_hop``.
        prompt: The question, or the text to continue.
        answer: The right answer, where one is known.
        before_text: Greedy continuation by the unedited model.
        after_text: Greedy continuation by the edited model.
        teacher_forced: Share of the answer's tokens predicted right after the edit, in [0, 1].
        autoregressive: Whether the edited model's own continuation gives the answer.
        unchanged: Whether the answer is still that of the unedited model (locality).
    """

    role: str
    kind: str = ""
    prompt: str = ""
    answer: str = ""
    before_text: str = ""
    after_text: str = ""
    teacher_forced: float | None = None
    autoregressive: bool | None = None
    unchanged: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacher_forced", _finite(self.teacher_forced))


@dataclass(frozen=True)
class EditRow:
    """One edit: what was asked, what the model said before and after, and what it cost.

    Args:
        id: Name of the edit request.
        prompt: The edited prompt.
        subject: What the fact is about.
        target_new: The answer to learn.
        target_old: The answer to replace, where it is known.
        before_text: Greedy continuation of the prompt by the unedited model.
        after_text: Greedy continuation of the prompt by the edited model.
        before: Scores of this edit before it, ``<metric>/<reading>`` -> value.
        after: Scores of this edit after it.
        norm: Size of the change, ‖Δ‖ (Frobenius).
        relative_norm: ‖Δ‖ / ‖W‖ over the weights it touches.
        seconds: Time that the edit took.
        diagnostics: What the method tells of itself: ``loss``, ``steps``, ``p_target`` …
        probes: The questions beside the edit.
    """

    id: str
    prompt: str
    subject: str = ""
    target_new: str = ""
    target_old: str | None = None
    before_text: str = ""
    after_text: str = ""
    before: Mapping[str, float | None] = field(default_factory=dict)
    after: Mapping[str, float | None] = field(default_factory=dict)
    norm: float | None = None
    relative_norm: float | None = None
    seconds: float | None = None
    diagnostics: Mapping[str, object] = field(default_factory=dict)
    probes: Sequence[ProbeRow] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "probes", tuple(self.probes))
        for name in ("before", "after", "diagnostics"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name in ("norm", "relative_norm", "seconds"):
            object.__setattr__(self, name, _finite(getattr(self, name)))


@dataclass(frozen=True)
class RunReport:
    """All that is known about a run of edits.

    Args:
        method: Name of the editor, such as ``ROME``.
        paper: Address of the paper that describes the method.
        settings: The editor's hyper-parameters.
        model: The edited model: ``id, revision, dtype, sha256, parameters``.
        requests_sha256: Hash of the edit requests.
        metrics: ``<metric>/<reading>`` -> row; ``portability/<kind>/<reading>`` for the kinds.
        edits: One row an edit, in the order of editing.
        not_taken: Ids of the edits whose new answer the edited model does not give, token by token,
            and of those that failed, right after each was made.
        layers: Parameter name -> ``{"norm": ‖Δ‖, "relative_norm": ‖Δ‖ / ‖W‖}``.
        versions: Package -> version.
        seconds: Stage -> seconds, such as ``total``, ``edit``, ``evaluate``.
        peak_memory_bytes: Most memory held at a time, where it was measured.
        sequence: Points of the curve over a sequence of edits: ``edits`` -> how many were made,
            and ``<metric>/<reading>`` -> value; of a training ``step`` -> how many steps.
        notes: Remarks for the reader.
        created: ISO date of the run, given by the caller.
        artifact: Folder of the saved edit, relative to the report; empty where none is saved.
        artifact_class: Class whose ``load`` reads that folder.

    Examples:
        >>> row = MetricRow(before=0.0, after=float("nan"), n=3)
        >>> report = RunReport(method="ROME", metrics={"reliability/teacher_forced": row})
        >>> report.to_dict()["metrics"]["reliability/teacher_forced"]
        {'before': 0.0, 'after': None, 'n': 3, 'ci': None}
        >>> RunReport.from_dict(report.to_dict()) == report
        True
    """

    method: str
    paper: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    model: Mapping[str, object] = field(default_factory=dict)
    requests_sha256: str = ""
    metrics: Mapping[str, MetricRow] = field(default_factory=dict)
    edits: Sequence[EditRow] = ()
    not_taken: Sequence[str] = ()
    layers: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float | None] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    sequence: Sequence[Mapping[str, float | str | None]] = ()
    notes: Sequence[str] = ()
    created: str = ""
    artifact: str = "delta"
    artifact_class: str = "WeightDelta"

    def __post_init__(self) -> None:
        for name in ("settings", "model", "layers", "versions", "seconds", "sequence"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name in ("edits", "not_taken", "sequence", "notes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def to_dict(self) -> dict[str, object]:
        """The report as plain JSON types; numbers that are not finite become ``None``."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, record: Mapping[str, object], where: str = "report") -> Self:
        """Reads a report from plain JSON types; keys it does not know are left aside.

        Args:
            record: Keys are the field names of this class.
            where: Names the file in errors.

        Raises:
            ArtifactError: If a field is missing or of the wrong type.
        """
        data = _fields(cls, record, where)
        data["metrics"] = {
            str(name): _metric(row, f"{where}, metrics[{name!r}]")
            for name, row in _items(data, "metrics", where)
        }
        edits = data.get("edits") or ()
        if not isinstance(edits, (list, tuple)):
            raise ArtifactError(
                f"{where}: `edits` is expected to be a list, but got {edits!r:.80}. Write the "
                "results again."
            )
        data["edits"] = tuple(_edit(row, f"{where}, edits[{i}]") for i, row in enumerate(edits))
        _check(cls, data, where, but=("metrics", "edits"))
        return cls(**data)


def plain(value: object) -> object:
    """Turns a value into JSON types: not finite -> ``None``, tensors -> lists, others -> text.

    Examples:
        >>> plain({"lr": 5e-1, "layers": (1, 2), "loss": float("nan"), 3: {"a"}})
        {'lr': 0.5, 'layers': [1, 2], 'loss': None, '3': ['a']}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return _finite(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    to_list = getattr(value, "tolist", None)
    if callable(to_list):  # tensors and arrays, without importing either
        return plain(to_list())
    return str(value)


def _finite(value: float | None) -> float | None:
    try:
        return None if value is None or not math.isfinite(value) else float(value)
    except OverflowError:  # a whole number beyond all floating ones
        return None


def _metric(record: object, where: str) -> MetricRow:
    data = _fields(MetricRow, record, where)
    try:
        _check(MetricRow, data, where, but=("ci",))
        if data.get("ci") is not None:
            low, high = data["ci"]
            data["ci"] = (float(low), float(high))
        return MetricRow(**data)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArtifactError(
            f"{where}: expected numbers `before`, `after`, `n` and a pair `ci`, but got "
            f"{record!r} ({error}). Write the results again."
        ) from None


def _edit(record: object, where: str) -> EditRow:
    data = _fields(EditRow, record, where)
    _check(EditRow, data, where, but=("probes",))
    probes = data.get("probes") or ()
    if not isinstance(probes, (list, tuple)):
        raise ArtifactError(
            f"{where}: `probes` is expected to be a list, but got {probes!r:.80}. Write the "
            "results again."
        )
    data["probes"] = tuple(_probe(probe, f"{where}, probes[{i}]") for i, probe in enumerate(probes))
    return EditRow(**data)


def _probe(record: object, where: str) -> ProbeRow:
    data = _fields(ProbeRow, record, where)
    _check(ProbeRow, data, where)
    return ProbeRow(**data)


def _check(cls: type, data: Mapping[str, object], where: str, but: Sequence[str] = ()) -> None:
    """Checks fields that were read by the types that they are annotated with.

    Raises:
        ArtifactError: If one has another.
    """
    from pydantic import ValidationError

    for name, adapter in _adapters(cls).items():
        if name not in data or name in but:
            continue
        try:
            adapter.validate_python(data[name], strict=True)
        except (ValidationError, RecursionError) as error:
            is_deep = isinstance(error, RecursionError)
            words = "nested too deeply" if is_deep else str(error).splitlines()[-2].strip()
            raise ArtifactError(
                f"{where}: `{name}` is not what a report holds there ({words}). Write the results "
                "again."
            ) from None


@cache
def _adapters(cls: type) -> dict[str, TypeAdapter[object]]:
    from pydantic import TypeAdapter

    return {name: TypeAdapter(hint) for name, hint in get_type_hints(cls).items()}


def _items(data: Mapping[str, object], name: str, where: str) -> list[tuple[object, object]]:
    value = data.get(name) or {}
    if not isinstance(value, Mapping):
        raise ArtifactError(
            f"{where}: `{name}` is expected to be a mapping, but got {value!r}. "
            "Write the results again."
        )
    return list(value.items())


def _fields(cls: type, record: object, where: str) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise ArtifactError(
            f"{where}: expected a mapping of fields, but got {record!r}. Write the results again."
        )
    data = {}
    for f in fields(cls):
        optional = f.default is not MISSING or f.default_factory is not MISSING
        if f.name in record and not (optional and record[f.name] is None):
            data[f.name] = record[f.name]
        elif not optional:
            raise ArtifactError(
                f"{where}: the field `{f.name}` is missing. Write the results again."
            )
    return data
