# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Token rows by which target values are searched, and which requests share a batch of them."""

# Shapes: E requests, T context templates, N = E (T + 1) rows, X target tokens of all rows.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.request import EditRequest

__all__ = ["TargetRows", "search_turns"]

# Tokens from the subjects on that are run at once. An accelerator's matrix products are at their
# full rate from a few thousand rows on, and what is kept for the way back takes some 3 MB a token
# in a model of 8 B parameters; a processor is at its full rate with far fewer.
DEVICE_TOKENS, HOST_TOKENS = 4096, 1024
# Padding that requests of several widths may bring, as a share of their tokens. An accelerator
# reads all weights for a few tokens as long as for these many, so that padding up to there is free.
WASTE, FREE_TOKENS = 0.25, 512


@dataclass
class TargetRows:
    """Rows of a batch, each request's templates and then its anchor, and where losses are read.

    Args:
        ids: Token ids of N rows.
        splits: Index of the subject's last token in each row.
        owner: Request of each row.
        row: Row of each target token, X of them.
        column: Column that predicts it, counted from the subject's last token.
        token: Its id.
        weight: What it counts for in the mean over its request's templates and tokens.
        anchor: Anchor row of each request.
    """

    ids: list[list[int]] = field(default_factory=list)
    splits: list[int] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    column: list[int] = field(default_factory=list)
    token: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    anchor: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        tokens: PromptTokenizer,
        requests: Sequence[EditRequest],
        templates: Sequence[str],
        kl_prompt: str,
    ) -> TargetRows:
        """The rows of some requests.

        Args:
            tokens: The model's tokenizer.
            requests: E edit requests.
            templates: T context templates, each of which ends in ``{}``.
            kl_prompt: Anchor prompt; ``{}`` stands for the subject.

        Raises:
            RequestError: If a request in its context is longer than the model's.
        """
        rows = cls()
        for e, request in enumerate(requests):
            target = tokens.target(request.prompt, request.target_new, request.glued)
            for template in templates:
                prefix = template.removesuffix("{}")
                prompt, last = tokens.subject_of(request, prefix)
                tokens.check_length(request, len(prompt), len(target), prefix)
                for j, token in enumerate(target):
                    rows.row.append(len(rows.ids))
                    rows.column.append(len(prompt) - 1 + j - last)
                    rows.token.append(token)
                    rows.weight.append(1 / (len(target) * len(templates)))
                rows.ids.append(prompt + target[:-1])
                rows.splits.append(last)
                rows.owner.append(e)
            anchor, last = tokens.subject_last(
                kl_prompt.replace("{}", request.subject, 1),
                request.subject,
                start=kl_prompt.index("{}"),
            )
            rows.anchor.append(len(rows.ids))
            # The words after the subject cannot matter at the subject, where the KL is read.
            rows.ids.append(anchor[: last + 1])
            rows.splits.append(last)
            rows.owner.append(e)
        return rows


def search_turns(
    tokens: PromptTokenizer,
    requests: Sequence[EditRequest],
    templates: int,
    max_rows: int,
    device: torch.device,
) -> list[list[int]]:
    """Requests to take together: of near widths, and as many as fill the device.

    Args:
        tokens: The model's tokenizer.
        requests: E edit requests.
        templates: T, how many context templates there are.
        max_rows: Rows at once at most.
        device: Where the model is.

    Returns:
        Indices of requests, each of them in one turn. Requests of a turn are padded to the widest
        of them, and turns of near width are of near size.

    Examples:
        >>> from lightning_edit.demos import tiny_requests, tiny_tokenizer
        >>> tokens = PromptTokenizer(tiny_tokenizer())
        >>> turns = search_turns(tokens, tiny_requests(6), 3, 12, torch.device("cpu"))
        >>> [len(turn) for turn in turns]
        [2, 2, 2]
    """
    widths = []
    for request in requests:
        prompt, last = tokens.subject_of(request)
        target = tokens.target(request.prompt, request.target_new, request.glued)
        widths.append(len(prompt) - last + len(target) - 1)
    is_host = device.type == "cpu"
    bound, free = (HOST_TOKENS, 0) if is_host else (DEVICE_TOKENS, FREE_TOKENS)
    turns: list[list[int]] = []
    for group in _near(widths, templates, free):
        widest, rows = widths[group[0]], templates + 1
        per_turn = max(1, min(max_rows // rows, bound // (rows * widest)))
        count = -(-len(group) // per_turn)
        turns += [
            group[len(group) * i // count : len(group) * (i + 1) // count] for i in range(count)
        ]
    return turns


def _near(widths: Sequence[int], templates: int, free: int) -> list[list[int]]:
    """Groups of near widths, the widest of each first."""
    groups: list[list[int]] = []
    used = padded = 0
    for e in sorted(range(len(widths)), key=lambda e: -widths[e]):
        own = templates * widths[e]
        wide = templates * widths[groups[-1][0]] if groups else 0
        if groups and padded + wide <= used + own + max(WASTE * (used + own), free):
            groups[-1].append(e)
            used, padded = used + own, padded + wide
        else:
            groups.append([e])
            used = padded = own
    return groups
