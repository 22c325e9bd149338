# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What is asked for: an edit in plain text, and the probes that will judge it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Self

from lightning_edit.core.errors import RequestError

__all__ = ["LOCALITY_KINDS", "PORTABILITY_KINDS", "EditRequest", "Probe", "check_requests"]

LOCALITY_KINDS = ("neighborhood", "distracting", "unrelated")
PORTABILITY_KINDS = ("one_hop", "subject_alias", "inverse")


@dataclass(frozen=True)
class Probe:
    """A question beside the edit: either outside its scope (locality) or following from it.

    Args:
        prompt: Text to continue or question to answer.
        answer: The right answer: of the unedited model's world for locality, of the edited world
            for portability. May be empty for locality, which compares the model with itself.
        kind: For locality ``neighborhood`` (same relation, another subject), ``distracting`` (the
            new fact stands in the prompt) or ``unrelated``; for portability ``one_hop``,
            ``subject_alias`` or ``inverse``.
        aliases: Further spellings of the answer that count as right.

    Raises:
        RequestError: If a field is no text, or the aliases are no list of texts.
    """

    prompt: str
    answer: str = ""
    kind: str = "neighborhood"
    aliases: tuple[str, ...] = ()

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

    @property
    def answers(self) -> tuple[str, ...]:
        """The answer and its aliases."""
        return (self.answer, *self.aliases)


@dataclass(frozen=True)
class EditRequest:
    """One fact to change, as text: the edit itself and the probes that judge it.

    Args:
        prompt: Text whose continuation (``"The capital of France is"``) or question whose answer
            (``"What is the capital of France?"``) is to change. ``{}`` stands for the subject
            where the prompt does not name it.
        subject: What the fact is about; occurs literally in the prompt.
        target_new: The answer to learn.
        target_old: The answer to replace, where it is known.
        rephrases: Other wordings of the prompt (generality).
        locality: Probes whose answers must stay.
        portability: Probes whose answers follow from the new fact.
        id: Name by which the edit is listed and undone; made from the content when empty.

    Raises:
        RequestError: If the prompt or target is empty, the subject is not in the prompt, or a
            probe is malformed.

    Examples:
        >>> request = EditRequest(prompt="The capital of {} is", subject="France",
        ...                       target_new="Rome", target_old="Paris")
        >>> request.prompt
        'The capital of France is'
        >>> EditRequest.from_dict(request.to_dict()) == request
        True
    """

    prompt: str
    subject: str
    target_new: str
    target_old: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    id: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise RequestError(
                    f"{self._name()}: `{name}` is expected to be text, but got {value!r}. "
                    f"Write the {name.replace('_', ' ')} of the edit."
                )
        for name, is_optional in (("target_old", True), ("id", False)):
            value = getattr(self, name)
            if not isinstance(value, str) and not (is_optional and value is None):
                raise RequestError(
                    f"{self._name()}: `{name}` is expected to be text, but got {value!r}. "
                    "Write it in quotes, or leave it out."
                )
        object.__setattr__(self, "target_old", self.target_old or None)
        if self.subject not in self.prompt:
            # str.format would trip over other braces in the prompt.
            object.__setattr__(self, "prompt", self.prompt.replace("{}", self.subject, 1))
        if self.subject not in self.prompt:
            raise RequestError(
                f"{self._name()}: the subject {self.subject!r} does not occur in the prompt "
                f"{self.prompt!r}. Spell it as in the prompt, or write {{}} where it belongs."
            )
        rephrases = _texts(self.rephrases)
        if rephrases is None or not all(text.strip() for text in rephrases):
            raise RequestError(f"{self._name()}: `rephrases` is expected to be a list of texts.")
        object.__setattr__(self, "rephrases", rephrases)
        for name, kinds in (("locality", LOCALITY_KINDS), ("portability", PORTABILITY_KINDS)):
            probes = tuple(getattr(self, name))
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
        if not self.id:
            object.__setattr__(self, "id", self.sha256()[:12])

    def _name(self) -> str:
        return f"Edit request {self.id or self.prompt!r}"

    @property
    def is_question(self) -> bool:
        """Whether the prompt is a question to answer rather than a text to continue."""
        return is_question(self.prompt)

    def to_dict(self) -> dict[str, object]:
        """The request as plain JSON types, without empty fields."""
        record = asdict(self)
        for name in ("locality", "portability"):
            record[name] = [{k: v for k, v in probe.items() if v} for probe in record[name]]
        return {k: v for k, v in record.items() if v}

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
        """Hash of the edit itself (prompt, subject, targets), in hexadecimal."""
        text = json.dumps([self.prompt, self.subject, self.target_new, self.target_old])
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


def check_requests(requests: Sequence[EditRequest]) -> None:
    """Checks a set of requests against each other.

    Warns where a target equals the old answer.

    Raises:
        RequestError: If the set is empty, two requests share an id, or two of them demand
            different answers to one prompt.
    """
    if not requests:
        raise RequestError("There are no edit requests. Give at least one.")
    by_id: dict[str, EditRequest] = {}
    by_prompt: dict[str, EditRequest] = {}
    for request in requests:
        other = by_prompt.setdefault(request.prompt.strip(), request)
        if other.target_new.strip() != request.target_new.strip():
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


def _probe(record: object, kind: str, where: str) -> Probe:
    data = {"kind": kind, **_known_fields(Probe, record, where)}
    data["aliases"] = data.get("aliases") or ()
    try:
        return Probe(**data)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None


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
        if f.default is not MISSING or f.default_factory is not MISSING
    }
    for name in known:
        if name not in record and name not in optional:
            raise RequestError(f"{where}: the field `{name}` is missing.")
    # null in JSON says as much as leaving the field out.
    return {k: v for k, v in record.items() if v is not None or k not in optional}
