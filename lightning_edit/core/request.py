# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What is asked for: an edit in plain text, and the probes that will judge it."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Self, TypeVar

from lightning_edit.core.documents import check_text
from lightning_edit.core.errors import RequestError
from lightning_edit.core.spacing import is_inside_word, word_starts

__all__ = [
    "LOCALITY_KINDS",
    "PORTABILITY_KINDS",
    "EditRequest",
    "Probe",
    "cases",
    "check_requests",
    "check_subjects",
    "warn_of_several_places",
]

T = TypeVar("T")

LOCALITY_KINDS = ("neighborhood", "distracting", "unrelated")
PORTABILITY_KINDS = (
    "one_hop",
    "subject_alias",
    "inverse",
    "single_hop",
    "multi_hop",
    "conflict",
)


def _retaken(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields may be set to what they are, and to nothing else.

    Lightning's precision plugins rebuild dataclasses in a batch field by field, and refuse those
    that do not let them.
    """
    refuse = cls.__setattr__

    def set_field(self: T, name: str, value: object) -> None:
        if name not in vars(self) or vars(self)[name] != value:
            refuse(self, name, value)

    type.__setattr__(cls, "__setattr__", set_field)
    return cls


@_retaken
@dataclass(frozen=True)
class Probe:
    """A question beside the edit: either outside its scope (locality) or following from it.

    Args:
        prompt: Text to continue or question to answer.
        answer: The right answer: of the unedited model's world for locality, of the edited world
            for portability. May be empty for locality, which compares the model with itself.
        kind: For locality ``neighborhood`` (same relation, another subject), ``distracting`` (the
            new fact stands in the prompt) or ``unrelated``; for portability ``one_hop``,
            ``subject_alias``, ``inverse``, ``single_hop`` and ``multi_hop`` (a fact of a chain, and
            a question that needs the whole chain, each in one of its wordings) or ``conflict``
            (follows from the edit and contradicts the one before it in its case).
        aliases: Further spellings of the answer that count as right.
        glued: Whether the answer follows the prompt without a space; as running text has it if
            None.

    Raises:
        RequestError: If a field is no text, or the aliases are no list of texts.
    """

    prompt: str
    answer: str = ""
    kind: str = "neighborhood"
    aliases: tuple[str, ...] = ()
    glued: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("prompt", "answer", "kind"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise RequestError(
                    f"`{name}` of a probe is expected to be text, but got {value!r}. "
                    "Write it in quotes."
                )
        aliases = _texts(self.aliases)
        if aliases is None:
            raise RequestError(
                f"`aliases` is expected to be a list of texts, not {self.aliases!r}."
            )
        object.__setattr__(self, "aliases", aliases)
        _check_glued(self.glued, "a probe")

    @property
    def answers(self) -> tuple[str, ...]:
        """The answer and its aliases."""
        return (self.answer, *self.aliases)


@_retaken
@dataclass(frozen=True)
class EditRequest:
    """One fact to change, as text: the edit itself and the probes that judge it.

    Args:
        prompt: Text whose continuation (``"The capital of France is"``) or question whose answer
            (``"What is the capital of France?"``) is to change. The first ``{}`` is the subject's
            place and becomes the subject.
        subject: What the fact is about; occurs literally in the prompt. May be left out for
            methods that need none.
        target_new: The answer to learn.
        target_old: The answer to replace, where it is known.
        rephrases: Other wordings of the prompt (generality).
        locality: Probes whose answers must stay.
        portability: Probes whose answers follow from the new fact.
        id: Name by which the edit is listed and undone; made from the content when empty.
        glued: Whether the answers follow the prompt and the rephrases without a space (True) or
            with one (False); as running text has it if None, see
            ``lightning_edit.core.spacing.space_between``.
        subject_start: Index of the subject's first character in the prompt, in which ``{}`` then
            means itself. Kept where it says more than the prompt alone does; None for the first
            place where the subject is a word of its own.
        case: Name of the case that the request is a part of, where several that stand together are
            measured together, such as the edits of a chain of facts; else it is one by itself.
        metadata: What else is to be known of it, such as a ticket or a reason, as JSON types. It
            is kept beside the edit and changes nothing in it.

    Raises:
        RequestError: If the prompt or target is empty, the subject is not in the prompt, a
            probe is malformed, or the metadata is nothing that JSON can hold.

    Warns:
        UserWarning: If the subject is found only as a part of another word.

    Examples:
        >>> request = EditRequest(prompt="The capital of {} is", subject="France",
        ...                       target_new="Rome", target_old="Paris")
        >>> request.prompt
        'The capital of France is'
        >>> EditRequest.from_dict(request.to_dict()) == request
        True
    """

    prompt: str
    subject: str = ""
    target_new: str = field(default="", metadata={"is_needed": True})
    target_old: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    id: str = field(default="", kw_only=True)
    glued: bool | None = field(default=None, kw_only=True)
    subject_start: int | None = field(default=None, kw_only=True)
    case: str = field(default="", kw_only=True)
    metadata: Mapping[str, object] = field(default_factory=dict, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "subject", "" if self.subject is None else self.subject)
        for name in ("prompt", "subject", "target_new"):
            value = getattr(self, name)
            is_left_out = name == "subject" and value == ""
            if not isinstance(value, str) or not (value.strip() or is_left_out):
                raise RequestError(
                    f"{self._name()}: `{name}` is expected to be text, but got {value!r}. "
                    f"Write the {name.replace('_', ' ')} of the edit."
                )
        for name, is_optional in (("target_old", True), ("id", False), ("case", False)):
            value = getattr(self, name)
            if not isinstance(value, str) and not (is_optional and value is None):
                raise RequestError(
                    f"{self._name()}: `{name}` is expected to be text, but got {value!r}. "
                    "Write it in quotes, or leave it out."
                )
        object.__setattr__(self, "target_old", self.target_old or None)
        _check_glued(self.glued, self._name())
        self._place_subject()
        rephrases = _texts(self.rephrases)
        if rephrases is None or not all(text.strip() for text in rephrases):
            raise RequestError(f"{self._name()}: `rephrases` is expected to be a list of texts.")
        object.__setattr__(self, "rephrases", rephrases)
        for name, kinds in (("locality", LOCALITY_KINDS), ("portability", PORTABILITY_KINDS)):
            given = getattr(self, name)
            if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
                raise RequestError(
                    f"{self._name()}: `{name}` is expected to be a list of probes, but got "
                    f"{given!r:.80}."
                )
            probes = tuple(given)
            for probe in probes:
                if not isinstance(probe, Probe):
                    raise RequestError(
                        f"{self._name()}: `{name}` is expected to be a list of probes, but it "
                        f"holds {probe!r}."
                    )
                if probe.kind not in kinds:
                    raise RequestError(
                        f"{self._name()}: a {name} probe has the kind {probe.kind!r}; "
                        f"expected one of {', '.join(kinds)}."
                    )
                if not probe.prompt.strip():
                    raise RequestError(f"{self._name()}: a {name} probe has an empty prompt.")
                if name == "portability" and not probe.answer.strip():
                    raise RequestError(
                        f"{self._name()}: the portability probe {probe.prompt!r} has no answer."
                    )
            object.__setattr__(self, name, probes)
        object.__setattr__(self, "metadata", self._plain_metadata())
        if not self.id:
            object.__setattr__(self, "id", self.sha256()[:12])

    def _plain_metadata(self) -> dict[str, object]:
        """A copy of the metadata, as JSON would give it back."""
        try:
            if not isinstance(self.metadata, Mapping):
                raise TypeError("it is no mapping")
            plain = json.loads(json.dumps(dict(self.metadata), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(
                f"{self._name()}: `metadata` is expected to be a mapping of names to JSON types, "
                f"but got {self.metadata!r:.80} ({error}). Write texts, numbers and lists of them."
            ) from None
        return dict(plain)

    def _name(self) -> str:
        return f"Edit request {self.id or self.prompt!r}"

    def _place_subject(self) -> None:
        """Puts the subject into its place and notes where that is, if it is not plain."""
        prompt, subject, start = self.prompt, self.subject, self.subject_start
        if not subject:
            if start is not None or "{}" in prompt:
                raise RequestError(
                    f"{self._name()}: there is a place for the subject, but no subject. Give the "
                    "`subject`, or write the prompt without {} and `subject_start`."
                )
            return
        if start is None and "{}" in prompt:
            # str.format would trip over other braces in the prompt.
            start = prompt.index("{}")
            prompt = prompt[:start] + subject + prompt[start + 2 :]
        elif start is None:
            start = next(iter(word_starts(prompt, subject)), prompt.find(subject))
            if start < 0:
                raise RequestError(
                    f"{self._name()}: the subject {subject!r} does not occur in the prompt "
                    f"{prompt!r}. Spell it as in the prompt, or write {{}} where it belongs."
                )
            if is_inside_word(prompt, start, len(subject)):
                warnings.warn(
                    f"{self._name()}: the subject {subject!r} is a part of another word in "
                    f"{prompt!r}, and that place is edited. Name the whole word, or write {{}} "
                    "where the subject belongs.",
                    UserWarning,
                    stacklevel=4,
                )
        elif type(start) is not int or start < 0 or not prompt.startswith(subject, start):
            raise RequestError(
                f"{self._name()}: `subject_start` is {start!r}, but {subject!r} does not begin "
                f"there in {prompt!r}. Leave it out, and write {{}} where the subject belongs."
            )
        is_plain = start == prompt.index(subject) and "{}" not in prompt
        object.__setattr__(self, "prompt", prompt)
        object.__setattr__(self, "subject_start", None if is_plain else start)

    @property
    def is_question(self) -> bool:
        """Whether the prompt is a question to answer rather than a text to continue."""
        return is_question(self.prompt)

    def to_dict(self) -> dict[str, object]:
        """The request as plain JSON types, without empty fields."""
        record = asdict(self)
        for name in ("locality", "portability"):
            record[name] = [_filled(probe) for probe in record[name]]
        return _filled(record)

    def fact(self) -> Self:
        """The request without its probes, by the same id."""
        fact = copy.copy(self)  # it was checked, and warned of, when it was made
        for name in ("rephrases", "locality", "portability"):
            object.__setattr__(fact, name, ())
        return fact

    @classmethod
    def from_dict(cls, record: Mapping[str, object], where: str = "request") -> Self:
        """Reads a request from plain JSON types.

        Args:
            record: Keys are the field names of this class.
            where: Names the file and record in errors.

        Raises:
            RequestError: If a field is missing, unknown or of the wrong type.
        """
        data = _known_fields(cls, record, where)
        if isinstance(data.get("rephrases"), str):
            raise RequestError(f"{where}: `rephrases` is a list of texts, not one text.")
        for name, kind in (("locality", "neighborhood"), ("portability", "one_hop")):
            probes = data.get(name) or ()
            if isinstance(probes, (str, Mapping)) or not isinstance(probes, Iterable):
                raise RequestError(f"{where}: `{name}` is expected to be a list of probes.")
            data[name] = tuple(
                probe if isinstance(probe, Probe) else _probe(probe, kind, f"{where}, {name}[{i}]")
                for i, probe in enumerate(probes)
            )
        try:
            return cls(**data)
        except RequestError as error:
            raise RequestError(f"{where}: {error}") from None

    def sha256(self) -> str:
        """Hash of the edit itself (prompt, subject, targets, and how they join), in hexadecimal."""
        edit = [self.prompt, self.subject, self.target_new, self.target_old]
        joined = {"glued": self.glued, "subject_start": self.subject_start}
        given = {name: value for name, value in joined.items() if value is not None}
        text = json.dumps([*edit, given] if given else edit)
        return hashlib.sha256(text.encode()).hexdigest()

    def to(self, device: object) -> Self:
        """Returns the request itself: text has no device. Lets Lightning move a list of them."""
        return self

    def reversed(self) -> Self:
        """The request that asks for the old answer again.

        Raises:
            RequestError: If the old answer is not known.
        """
        if not self.target_old:
            raise RequestError(f"{self._name()}: `target_old` is not known.")
        return replace(self, target_new=self.target_old, target_old=self.target_new, id="")


def is_question(prompt: str) -> bool:
    """Whether a prompt asks (ends with a question mark) rather than begins a sentence."""
    return prompt.rstrip().endswith(("?", "？"))


def cases(requests: Sequence[EditRequest]) -> list[list[EditRequest]]:
    """Requests by the case that they are a part of, in order; one without a case by itself.

    Examples:
        >>> named = {"a": "", "b": "one", "c": "one", "d": ""}
        >>> edits = [EditRequest("x", "", "y", id=id, case=case) for id, case in named.items()]
        >>> [[request.id for request in case] for case in cases(edits)]
        [['a'], ['b', 'c'], ['d']]
    """
    found: list[list[EditRequest]] = []
    for request in requests:
        if request.case and found and found[-1][-1].case == request.case:
            found[-1].append(request)
        else:
            found.append([request])
    return found


def check_requests(requests: Sequence[EditRequest], *, in_turn: bool = False) -> None:
    """Checks a set of requests against each other.

    Warns where a target equals the old answer.

    Args:
        requests: The requests.
        in_turn: Whether those of one case may come one after another, so that a later one may ask
            for something else than an earlier one.

    Raises:
        RequestError: If the set is empty, two requests share an id, or two of them demand
            different answers to one prompt, or a text holds half of a character.
    """
    if not requests:
        raise RequestError("There are no edit requests. Give at least one.")
    by_id: dict[str, EditRequest] = {}
    by_prompt: dict[str, EditRequest] = {}
    for request in requests:
        _check_whole(request)
        other = by_prompt.setdefault(request.prompt.strip(), request)
        differs = other.target_new.strip() != request.target_new.strip()
        if differs and not (in_turn and request.case and other.case == request.case):
            raise RequestError(
                f"Requests {other.id!r} and {request.id!r} contradict each other: the prompt "
                f"{request.prompt!r} cannot be answered by both {other.target_new!r} and "
                f"{request.target_new!r}. Keep one of them."
            )
        if request.id in by_id:
            raise RequestError(
                f"Two requests share the id {request.id!r} ({by_id[request.id].prompt!r} and "
                f"{request.prompt!r}). Give each its own `id`, or leave one out."
            )
        by_id[request.id] = request
        if request.target_old and request.target_old.strip() == request.target_new.strip():
            warnings.warn(
                f"Request {request.id!r}: the target {request.target_new!r} equals the old answer; "
                "the edit asks for no change.",
                UserWarning,
                stacklevel=2,
            )


def check_subjects(requests: Iterable[EditRequest], method: str) -> None:
    """Checks that requests name their subjects, for a method that needs them.

    Args:
        requests: The requests.
        method: Name of the method.

    Raises:
        RequestError: If one does not.
    """
    nameless = [f"{r.id!r} ({r.prompt!r})" for r in requests if not r.subject]
    if nameless:
        raise RequestError(
            f"{method} needs the subject of a request, but there is none in "
            f"{', '.join(nameless[:5])}{' and others' if len(nameless) > 5 else ''}. Give each its "
            "`subject`, or choose a method that needs none, such as FineTune or GRACE."
        )


def warn_of_several_places(requests: Iterable[EditRequest]) -> None:
    """Warns of prompts that name their subject several times, where no place is told."""
    for request in requests:
        times = len(word_starts(request.prompt, request.subject))
        if times > 1 and request.subject_start is None:
            warnings.warn(
                f"Request {request.id!r}: the subject {request.subject!r} occurs {times} times in "
                f"{request.prompt!r}; the first one is edited. Write {{}} for the one that is "
                "meant, or reword the prompt.",
                UserWarning,
                stacklevel=2,
            )


def _probe(record: object, kind: str, where: str) -> Probe:
    data = {"kind": kind, **_known_fields(Probe, record, where)}
    data["aliases"] = data.get("aliases") or ()
    try:
        return Probe(**data)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None


def _check_glued(value: object, owner: str) -> None:
    if value is not None and not isinstance(value, bool):
        raise RequestError(
            f"`glued` of {owner} is expected to be true, false or null, but got {value!r}."
        )


def _check_whole(request: EditRequest) -> None:
    """Checks that tokenizers can read the texts of a request."""
    probes = [
        text for p in (*request.locality, *request.portability) for text in (p.prompt, *p.answers)
    ]
    texts = (request.prompt, request.subject, request.target_new, request.target_old or "")
    for text in (*texts, *request.rephrases, *probes):
        try:
            check_text(text)
        except ValueError as error:
            raise RequestError(
                f"Request {request.id!r} cannot be read by a tokenizer: {error}. Write the whole "
                "character."
            ) from None


def _filled(record: Mapping[str, object]) -> dict[str, object]:
    """Fields that say something: all but the empty ones."""
    return {k: v for k, v in record.items() if v or v in (False, 0)}


def _texts(value: object) -> tuple[str, ...] | None:
    """A list of texts as a tuple; None if it is something else."""
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        return None
    texts = tuple(value)
    return texts if all(isinstance(text, str) for text in texts) else None


def _known_fields(cls: type, record: object, where: str) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise RequestError(f"{where}: expected a mapping of fields, but got {record!r}.")
    known = {f.name: f for f in fields(cls)}
    for name in record:
        if name not in known:
            raise RequestError(
                f"{where}: unknown field `{name}`. Known fields: {', '.join(known)}."
            )
    optional = {
        name
        for name, f in known.items()
        if (f.default is not MISSING or f.default_factory is not MISSING)
        and not f.metadata.get("is_needed")
    }
    for name in known:
        if name not in record and name not in optional:
            raise RequestError(f"{where}: the field `{name}` is missing.")
    # null in JSON says as much as leaving the field out.
    return {k: v for k, v in record.items() if v is not None or k not in optional}
