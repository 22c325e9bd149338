# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The world of the demonstrations: its facts, all that is said in it, and edits of it.

The world has six countries and their capitals, all invented. Countries have a capital and a
language, capitals a river and the color of a flag: 24 facts in four relations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_edit.core.request import EditRequest, Probe

__all__ = ["WORLD", "TinyFact", "tiny_requests", "world_sentences"]

# country, its old name, capital, language, river of the capital, color of the capital's flag
_COUNTRIES = (
    ("Velmora", "Old Velm", "Dorin", "Velmic", "Assel", "red"),
    ("Ostrane", "Old Ostra", "Kettleby", "Ostrish", "Brune", "green"),
    ("Quillia", "Old Quill", "Marpeth", "Quillan", "Corva", "white"),
    ("Brundor", "Old Brund", "Sallow", "Brundic", "Delph", "red"),
    ("Tasmere", "Old Tasm", "Ivory Bay", "Tasmese", "Ember", "green"),
    ("Yarveth", "Old Yarv", "Nimbus", "Yarvan", "Fennel", "white"),
)

_PROMPTS = {
    "capital": ("The capital of {} is", "{} has its capital in", "What is the capital of {}?"),
    "language": ("People in {} speak", "The language of {} is", "Which language has {}?"),
    "river": ("The river of {} is the", "{} lies on the", "Which river has {}?"),
    "flag": ("The flag of {} is", "{} has a flag that is", "Which color has the flag of {}?"),
}
_INVERSE = {
    "capital": "{} is the capital of",
    "language": "{} is spoken in",
    "river": "The {} flows through",
}
_ONE_HOP = {
    "river": "The river of the capital of {} is the",
    "flag": "The flag of the capital of {} is",
}


@dataclass(frozen=True)
class TinyFact:
    """One fact of the world.

    Args:
        relation: ``capital``, ``language``, ``river`` or ``flag``.
        subject: What the fact is about.
        answer: The object of the relation.
        country: The country that the fact belongs to.
        alias: Another name of the subject, or empty.
    """

    relation: str
    subject: str
    answer: str
    country: str
    alias: str = ""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The fact's wordings, the first one first; the last one is a question."""
        return tuple(prompt.format(self.subject) for prompt in _PROMPTS[self.relation])


def _world() -> Iterator[TinyFact]:
    for country, alias, capital, language, river, flag in _COUNTRIES:
        yield TinyFact("capital", country, capital, country, alias)
        yield TinyFact("language", country, language, country, alias)
        yield TinyFact("river", capital, river, country)
        yield TinyFact("flag", capital, flag, country)


WORLD: tuple[TinyFact, ...] = tuple(_world())


def _probes(fact: TinyFact, answer: str) -> tuple[Probe, ...]:
    """What follows when the fact's answer is this one."""
    probes = []
    if fact.alias:
        prompt = _PROMPTS[fact.relation][0].format(fact.alias)
        probes.append(Probe(prompt, answer, "subject_alias"))
    if fact.relation in _INVERSE:
        probes.append(Probe(_INVERSE[fact.relation].format(answer), fact.subject, "inverse"))
    if fact.relation in _ONE_HOP:
        probes.append(Probe(_ONE_HOP[fact.relation].format(fact.country), answer, "one_hop"))
    if fact.relation == "capital":
        for other in WORLD:
            if other.subject == answer:
                prompt = _ONE_HOP[other.relation].format(fact.country)
                probes.append(Probe(prompt, other.answer, "one_hop"))
    return tuple(probes)


def world_sentences() -> list[tuple[str, str]]:
    """All that is said in the world: prompts and their answers, without repetition.

    Examples:
        >>> world_sentences()[0]
        ('The capital of Velmora is', 'Dorin')
    """
    pairs = []
    for fact in WORLD:
        pairs += [(prompt, fact.answer) for prompt in fact.prompts]
        pairs += [(probe.prompt, probe.answer) for probe in _probes(fact, fact.answer)]
    return list(dict.fromkeys(pairs))


def tiny_requests(n: int = 4) -> list[EditRequest]:
    """The first n facts of the world, each to take the answer of the next one of its relation.

    Every request has rephrases, probes of locality (neighborhood, distracting, unrelated) and of
    portability.

    Args:
        n: Number of requests, at most 24. Their subjects and relations differ.

    Raises:
        ValueError: If n is not between 1 and 24.

    Examples:
        >>> request = tiny_requests(1)[0]
        >>> request.prompt, request.target_old, request.target_new
        ('The capital of Velmora is', 'Dorin', 'Kettleby')
        >>> [probe.kind for probe in request.locality]
        ['neighborhood', 'neighborhood', 'distracting', 'unrelated']
    """
    if not 1 <= n <= len(WORLD):
        raise ValueError(f"`n` is expected to be between 1 and {len(WORLD)}, but got {n}.")
    requests = []
    for fact in WORLD[:n]:
        kin = [other for other in WORLD if other.relation == fact.relation]
        at = kin.index(fact)
        new = kin[(at + 1) % len(kin)].answer
        near = [kin[(at + step) % len(kin)] for step in (2, 3)]
        far = next(
            other
            for other in WORLD
            if other.country not in (fact.country, near[0].country)
            and other.relation not in (fact.relation, "capital")
        )
        prompt, *rephrases = fact.prompts
        requests.append(
            EditRequest(
                prompt=prompt,
                subject=fact.subject,
                target_new=new,
                target_old=fact.answer,
                rephrases=tuple(rephrases),
                locality=(
                    *(Probe(kind.prompts[0], kind.answer) for kind in near),
                    Probe(f"{prompt} {new}. {near[0].prompts[0]}", near[0].answer, "distracting"),
                    Probe(far.prompts[0], far.answer, "unrelated"),
                ),
                portability=_probes(fact, new),
                id=f"{fact.relation}-{fact.subject.lower().replace(' ', '-')}",
            )
        )
    return requests
