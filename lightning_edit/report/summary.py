# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a run came to, in counts and in one sentence that anybody can read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_edit.report.glossary import METRICS, Term, metric_name, sort_metrics
from lightning_edit.report.results import EditRow, ProbeRow, RunReport
from lightning_edit.report.text import percent

__all__ = [
    "MAX_EDITS",
    "MIRAGE",
    "ROLES",
    "Gap",
    "Outcome",
    "gap_sentence",
    "gaps",
    "headline",
    "outcomes",
    "probe_passed",
    "role_outcome",
    "select_edits",
    "success",
]

MAX_IDS = 5  # of edits that did not take; all are in results.json
MAX_EDITS = 200  # more would make a page that no browser scrolls; edits.jsonl has them all

ROLES = {"generality": "rephrased", "locality": "neighbors", "portability": "consequences"}

MIRAGE = (
    "Most papers hand the model the right answer token by token and ask only for the next one "
    "(teacher forcing). In use it has to write by itself (autoregressive). The second number is "
    "the one to expect; the gap between them is the mirage."
)

# What the model writes by itself first, in a chat by what replies state; the others speak only
# where that was not measured.
_READINGS = ("stated", "autoregressive", "teacher_forced_strict", "teacher_forced")
_FREE = ("stated", "autoregressive")


@dataclass(frozen=True)
class Outcome:
    """How many cases of one metric came out as wished.

    Args:
        metric: Name of the metric.
        hits: Cases that came out as wished; ``None`` where only the share is known.
        total: Cases looked at.
        share: ``hits / total``, in [0, 1].
        reading: Reading that decided.
    """

    metric: str
    hits: int | None
    total: int
    share: float
    reading: str

    @property
    def term(self) -> Term:
        """What the metric means."""
        return METRICS[self.metric]

    @property
    def count(self) -> str:
        """The count in words, or the share where cases were not counted."""
        return percent(self.share) if self.hits is None else f"{self.hits} of {self.total}"


@dataclass(frozen=True)
class Gap:
    """One metric in both readings, after the edits.

    Args:
        label: The metric as written in a table.
        teacher_forced: Value with the right answer so far at hand, in [0, 1].
        autoregressive: Value where the model writes by itself, in [0, 1].
    """

    label: str
    teacher_forced: float
    autoregressive: float

    @property
    def value(self) -> float:
        """Teacher-forced minus autoregressive."""
        return self.teacher_forced - self.autoregressive

    @property
    def points(self) -> str:
        """The gap in percentage points, with its sign."""
        points = round(100 * self.value, 1)
        sign = "−" if points < 0 else "+" if points > 0 else "±"
        return f"{sign}{abs(points):g}"


def success(edit: EditRow, *, before: bool = False) -> tuple[bool | None, str]:
    """Whether an edit's prompt is answered with the new answer, and the reading that says so.

    Examples:
        >>> success(EditRow(id="a", prompt="p", after={"reliability/autoregressive": 1.0}))
        (True, 'autoregressive')
        >>> success(EditRow(id="a", prompt="p"))
        (None, '')
    """
    scores = edit.before if before else edit.after
    for reading in _READINGS:
        score = scores.get(f"reliability/{reading}")
        if score is not None:
            return score > 1 - 1e-6, reading
    return None, ""


def probe_passed(probe: ProbeRow) -> bool | None:
    """Whether a probe came out as wished: unchanged for locality, right for the others.

    Examples:
        >>> probe_passed(ProbeRow("locality", unchanged=True))
        True
        >>> probe_passed(ProbeRow("portability", teacher_forced=0.5))
        False
    """
    return _judge(probe)[0]


def role_outcome(probes: Iterable[ProbeRow], role: str) -> Outcome | None:
    """Counts the probes of one role; ``None`` where none was judged."""
    return _outcome(role, [_judge(probe) for probe in probes if probe.role == role])


def outcomes(report: RunReport) -> dict[str, Outcome]:
    """Reliability, generality, locality and portability as counts, where they are known.

    The counts come from the edits; where those are not at hand, the shares from the metrics.
    """
    found: dict[str, Outcome] = {}
    probes = [probe for edit in report.edits for probe in edit.probes]
    for metric in ("reliability", *ROLES):
        if metric == "reliability":
            outcome = _outcome(metric, [success(edit) for edit in report.edits])
        else:
            outcome = role_outcome(probes, metric)
        outcome = outcome or _from_metrics(report, metric)
        if outcome:
            found[metric] = outcome
    return found


def select_edits(edits: Sequence[EditRow], limit: int = MAX_EDITS) -> tuple[list[EditRow], str]:
    """The edits to show one by one, in their order, and a remark where those are not all.

    Args:
        edits: All edits.
        limit: Most edits to show; failed ones go before the others.

    Examples:
        >>> edits = [EditRow(id=name, prompt="p") for name in "abc"]
        >>> shown, remark = select_edits(edits, limit=2)
        >>> [edit.id for edit in shown], remark
        (['a', 'b'], '2 of 3 edits are shown, failed ones first; all are in edits.jsonl.')
    """
    if len(edits) <= limit:
        return list(edits), ""
    ranked = sorted(range(len(edits)), key=lambda i: (success(edits[i])[0] is not False, i))
    remark = f"{limit} of {len(edits)} edits are shown, failed ones first; all are in edits.jsonl."
    return [edits[i] for i in sorted(ranked[:limit])], remark


def headline(report: RunReport) -> str:
    """The run in one sentence.

    Examples:
        >>> edit = EditRow(id="a", prompt="p", after={"reliability/autoregressive": 1.0},
        ...                probes=[ProbeRow("locality", unchanged=False)])
        >>> headline(RunReport(method="ROME", edits=[edit]))
        'The fact was changed; 0 of 1 neighboring answer stayed as it was.'
        >>> missed = EditRow(id="b", prompt="p", after={"reliability/autoregressive": 0.0})
        >>> headline(RunReport(method="ROME", edits=[missed], not_taken=["b"]))
        'The fact was not changed; 1 of 1 edit did not take: b.'
    """
    found = outcomes(report)
    clauses = []
    if "reliability" in found:
        clauses.append(_reliability_clause(report, found["reliability"]))
    elif report.edits:
        n = len(report.edits)
        clauses.append(
            f"{n} edit{'s were' if n > 1 else ' was'} made; the new answers were not measured"
        )
    if "locality" in found:
        outcome = found["locality"]
        one = outcome.hits is not None and outcome.total == 1
        of = " of the" if outcome.hits is None else ""
        stayed = "answer stayed as it was" if one else "answers stayed as they were"
        clauses.append(f"{outcome.count}{of} neighboring {stayed}{_lost_note(report)}")
    if report.not_taken:
        count, more = len(report.not_taken), len(report.not_taken) - MAX_IDS
        of = f" of {len(report.edits)}" if report.edits else ""
        ids = ", ".join(report.not_taken[:MAX_IDS]) + (f" and {more} more" if more > 0 else "")
        noun = "edit" if max(count, len(report.edits)) == 1 else "edits"
        clauses.append(f"{count}{of} {noun} did not take: {ids}")
    sentence = "; ".join(clauses) or "Nothing was measured"
    return sentence[0].upper() + sentence[1:] + "."


def _lost_note(report: RunReport) -> str:
    """How many neighbors lost their right answer; the others that changed are worded otherwise."""
    known = [p.lost for edit in report.edits for p in edit.probes if p.lost is not None]
    if not known:
        return ""
    return f", and {sum(known)} of {len(known)} right ones were lost"


def gaps(report: RunReport) -> list[Gap]:
    """The metrics that were read both ways: by teacher forcing and as the model really writes."""
    found = []
    for key in sort_metrics(report.metrics):
        stem, _, reading = key.rpartition("/")
        read = (report.metrics.get(f"{stem}/{free}") for free in _FREE)
        twin = next((row for row in read if row is not None), None)
        forced = report.metrics[key].after
        if reading == "teacher_forced" and forced is not None and twin and twin.after is not None:
            found.append(Gap(metric_name(key).label, forced, twin.after))
    return found


def gap_sentence(found: Iterable[Gap]) -> str:
    """The mirage gap in words: of reliability, and of what is flattered more; else empty.

    Examples:
        >>> gap_sentence([Gap("Reliability", 0.96, 0.38)])
        'Here teacher forcing flatters the edits by 58 percentage points.'
        >>> gap_sentence([Gap("Reliability", 1.0, 1.0), Gap("Generality", 0.6, 0.33)])
        'Here teacher forcing does not flatter reliability, but generality by 27 percentage points.'
    """
    found = list(found)
    widest = max(found, key=lambda gap: gap.value, default=None)
    for gap in found:
        if gap.label == METRICS["reliability"].label:
            points = round(100 * gap.value, 1)
            size = f"{abs(points):g} percentage point{'' if abs(points) == 1 else 's'}"
            more = ""
            if widest is not None and widest.value > max(gap.value, 0) and widest.points != "±0":
                name = widest.label[0].lower() + widest.label[1:]
                plural = "" if widest.points == "+1" else "s"
                more = f", but {name} by {widest.points[1:]} percentage point{plural}"
            if points > 0:
                return f"Here teacher forcing flatters the edits by {size}{more}."
            if points < 0:
                return f"Here teacher forcing understates the edits by {size}{more}."
            what = "reliability" if more else "the edits"
            return f"Here teacher forcing does not flatter {what}{more}."
    return ""


def _reliability_clause(report: RunReport, outcome: Outcome) -> str:
    forced = "" if outcome.reading in _FREE else " (teacher-forced)"
    if outcome.hits is None:
        return f"the new answer is given in {outcome.count} of the cases{forced}"
    already = sum(success(edit, before=True)[0] is True for edit in report.edits)
    if outcome.total == 1:
        subject, were = "the fact", "was" if outcome.hits else "was not"
        note = ", as before the edit"
    else:
        subject, were = f"{outcome.count} facts", "were"
        note = f", {'all' if already == len(report.edits) else already} of them already before"
    if already:  # nothing was changed there, so the sentence must not say so
        return f"{subject} {were} answered as asked{forced}{note}"
    return f"{subject} {were} changed{forced}"


def _judge(probe: ProbeRow) -> tuple[bool | None, str]:
    if probe.role == "locality":
        return probe.unchanged, "unchanged"
    if probe.stated is not None:
        return probe.stated, "stated"
    if probe.autoregressive is not None:
        return probe.autoregressive, "autoregressive"
    if probe.teacher_forced is not None:
        return probe.teacher_forced > 1 - 1e-6, "teacher_forced"
    return None, ""


def _outcome(metric: str, judged: list[tuple[bool | None, str]]) -> Outcome | None:
    known = [(verdict, reading) for verdict, reading in judged if verdict is not None]
    if not known:
        return None
    hits = sum(bool(verdict) for verdict, _ in known)
    loosest = max((reading for _, reading in known), key=_looseness)
    return Outcome(metric, hits, len(known), hits / len(known), loosest)


def _from_metrics(report: RunReport, metric: str) -> Outcome | None:
    for reading in _READINGS:
        row = report.metrics.get(f"{metric}/{reading}")
        if row is not None and row.after is not None and METRICS[metric].is_rate:
            return Outcome(metric, None, row.n, row.after, reading)
    return None


def _looseness(reading: str) -> int:
    return _READINGS.index(reading) if reading in _READINGS else -1
