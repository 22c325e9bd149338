# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Prompts of wrong relations: the subject of one request, asked for what another one asks."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_edit.core.errors import RequestError
from lightning_edit.core.request import EditRequest, check_subjects
from lightning_edit.core.spacing import word_starts

__all__ = ["wrong_relations"]


def wrong_relations(
    requests: Sequence[EditRequest], templates: Sequence[str] | None = None, count: int = 3
) -> list[list[str]]:
    """Prompts about each request's subject that ask for another relation than its own.

    Two requests are of one relation if they share a wording with ``{}`` for the subject, be it
    their prompt or a rephrase.

    Args:
        requests: The requests.
        templates: Wordings of other relations, with ``{}`` for the subject; if None, those of the
            other requests' prompts, the next ones first.
        count: Prompts of a request at most.

    Returns:
        For each request one prompt or more.

    Raises:
        RequestError: If there is no other relation for a request, or a request has no subject.

    Examples:
        >>> from lightning_edit.demos import tiny_requests
        >>> requests = tiny_requests(4)
        >>> [request.prompt for request in requests[:2]]
        ['The capital of Velmora is', 'People in Velmora speak']
        >>> wrong_relations(requests, count=1)[0]
        ['People in Velmora speak']
    """
    check_subjects(requests, "A comparison with prompts of wrong relations")
    relations = _relations(requests)
    given = [_template(request, request.prompt) for request in requests]
    found: list[list[str]] = []
    for i, (request, own) in enumerate(zip(requests, relations, strict=True)):
        offered = given[i + 1 :] + given[:i] if templates is None else list(templates)
        others = [text for text in dict.fromkeys(offered) if text not in own]
        if not others:
            raise RequestError(
                f"Edit request {request.id!r}: there is no prompt of another relation to compare "
                "it with. Assess it together with requests about other relations, or name some by "
                "`contrast_templates`, such as ['{} was born in', '{} is made of']."
            )
        found.append([text.replace("{}", request.subject) for text in others[:count]])
    return found


def _template(request: EditRequest, text: str) -> str:
    """The text with ``{}`` for each mention of the subject, which may be none."""
    subject = request.subject
    starts = word_starts(text, subject) or [text.find(subject)]
    for start in reversed([start for start in starts if start >= 0]):
        text = text[:start] + "{}" + text[start + len(subject) :]
    return text


def _relations(requests: Sequence[EditRequest]) -> list[set[str]]:
    """All wordings of each request's relation that occur in the requests."""
    groups: list[set[str]] = []
    for request in requests:
        own = {_template(request, text) for text in (request.prompt, *request.rephrases)}
        for group in [group for group in groups if group & own]:
            groups.remove(group)
            own |= group
        groups.append(own)
    prompts = [_template(request, request.prompt) for request in requests]
    return [next(group for group in groups if prompt in group) for prompt in prompts]
