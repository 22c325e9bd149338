# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a model writes greedily after several prompts at once, each up to its natural stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_edit.core.batch import PromptTokenizer, pad_rows
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.functional.matching import is_ended, is_interjection
from lightning_edit.passes.caches import keeps_keys_and_values, takes
from lightning_edit.passes.decoding import GREEDY, end_ids, write
from lightning_edit.passes.prefixes import SharedPrefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Continuation", "greedy_texts"]

# Tokens that are written before rows that have ended are left out; then twice as many, and so on.
STAGE = 4


@dataclass(frozen=True)
class Continuation:
    """What a model writes after a prompt.

    Args:
        text: The text up to its first line break, stripped.
        ids: All tokens it wrote, line breaks and an end token included.
        is_spaced: Whether white space stands between the prompt and the text.
    """

    text: str
    ids: tuple[int, ...]
    is_spaced: bool = False


def greedy_texts(
    model: PreTrainedModel,
    tokens: PromptTokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    least: Sequence[int],
    prefix: SharedPrefix | None = None,
) -> list[Continuation]:
    """What a model writes after some prompts at once, up to natural stops.

    Args:
        model: A Hugging Face language model.
        tokens: Its tokenizer.
        prompts: Token ids of prompts.
        max_new_tokens: A generous cap.
        least: For each prompt, tokens before which a full stop does not end the text.
        prefix: What all prompts begin with, where that has been read.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    side = "right" if tokens.is_encoder_decoder else "left"
    # With a prefix, padding stands behind it.
    length = 0 if prefix is None else prefix.length
    ids, mask = pad_rows([prompt[length:] for prompt in prompts], tokens.pad_id, side=side)
    cache = None if prefix is None else prefix.cache(len(prompts))
    if prefix is not None:
        start = torch.tensor([list(prompts[0][:length])]).expand(len(prompts), -1)
        ids = torch.cat([start, ids], 1)
        mask = torch.cat([torch.ones_like(start), mask], 1)
    begin = 1 if tokens.is_encoder_decoder else ids.shape[1]
    ends = set(end_ids(model, tokens))
    memory = EditMemory.find(model)
    # Without a cache each token is read with the whole row, in which the prompt ends where it did.
    is_whole = not (tokens.is_encoder_decoder or takes(model, "cache"))
    settings = {**GREEDY, "use_cache": not is_whole}
    stop = _NaturalStop(tokens, prompts, least, begin)
    ids, mask = ids.to(device), mask.to(device)
    found: dict[int, list[int]] = {}
    for steps in _stages(model, tokens, max_new_tokens):
        if steps < max_new_tokens and cache is None:
            cache = DynamicCache()
        told = mask.sum(1)
        with memory.prompts_of(told) if memory is not None and is_whole else nullcontext():
            ids = write(
                model,
                tokens,
                ids,
                mask,
                {**settings, "max_new_tokens": steps},
                stop=[stop],  # type: ignore[list-item, unused-ignore]
                cache=cache,
            )
        for b, row in zip(stop.rows, ids[:, begin:].tolist(), strict=True):
            found[b] = row[: stop.lengths.get(b, len(row))]  # behind a stop there is only padding
        going = [
            r
            for r, b in enumerate(stop.rows)
            if b not in stop.lengths and not ends.intersection(found[b])
        ]
        if not going:
            break
        # A row that has come to its end costs as much as one that goes on.
        index = torch.tensor(going, device=device)
        stop.rows = [stop.rows[r] for r in going]
        ids = ids[index]
        mask = pad(mask[index], (0, ids.shape[1] - mask.shape[1]), value=1)
        if cache is not None:
            cache.batch_select_indices(index)
    written: list[Continuation] = []
    for b, prompt in enumerate(prompts):
        own = found[b]
        end = next((i for i, token in enumerate(own) if token in ends), len(own))
        text = _written(tokens, prompt, own[:end])
        kept = tuple(own[: end + 1])  # with an end token that was written
        line = text.strip().partition("\n")[0].rstrip()
        written.append(Continuation(line, kept, text[:1].isspace()))
    return written


def _stages(model: PreTrainedModel, tokens: PromptTokenizer, max_new_tokens: int) -> Iterator[int]:
    """Numbers of tokens after which rows that have ended are left out, where that can be done."""
    memory = EditMemory.find(model)
    decides = memory is not None and memory.is_hooked  # row by row, for as long as they are written
    if tokens.is_encoder_decoder or decides or not keeps_keys_and_values(model):
        yield max_new_tokens
        return
    step = STAGE
    while max_new_tokens > 0:
        yield min(step, max_new_tokens)
        max_new_tokens -= step
        step *= 2


class _NaturalStop:
    """Ends rows at a line's or a sentence's end, as a stopping criterion of transformers.

    Args:
        tokens: The tokenizer.
        prompts: Token ids of all prompts.
        least: For each, tokens before which a full stop does not end the text.
        begin: Where in a row what is written begins.
    """

    def __init__(
        self,
        tokens: PromptTokenizer,
        prompts: Sequence[Sequence[int]],
        least: Sequence[int],
        begin: int,
    ) -> None:
        self.tokens, self.prompts, self.least, self.begin = tokens, prompts, least, begin
        #: Prompts of the rows that are written.
        self.rows = list(range(len(prompts)))
        #: How many tokens were written of a row that has ended.
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        count = input_ids.shape[1] - self.begin
        written = input_ids[:, self.begin :].tolist()
        for b, own in zip(self.rows, written, strict=True):
            if b not in self.lengths:
                text = _written(self.tokens, self.prompts[b], own).lstrip()
                at_end = is_ended(text) and count >= self.least[b]
                if self.tokens.chat_template and is_interjection(text):
                    at_end = False
                if "\n" in text or (bool(text) and at_end):
                    self.lengths[b] = count
        return torch.tensor([b in self.lengths for b in self.rows], device=input_ids.device)


def _written(tokens: PromptTokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of tokens after a prompt, with the space that tokenizers drop where texts begin."""
    decode = tokens.tokenizer.decode
    before = [] if tokens.is_encoder_decoder else list(prompt[-1:])
    start = decode(before, skip_special_tokens=True)
    whole = str(decode([*before, *ids], skip_special_tokens=True))
    # A character whose bytes the prompt's last token only begins is read otherwise in the whole.
    is_apart = whole.startswith(start)
    return whole[len(start) :] if is_apart else str(decode(ids, skip_special_tokens=True))
