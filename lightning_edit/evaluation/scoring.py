# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a model says: batched teacher-forced scores and greedy continuations."""

# Shapes: B prompts, R answers of more than one token, F their forced tokens, K places of an answer,
# V vocabulary.

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_edit.core.batch import PromptTokenizer, pad_rows
from lightning_edit.core.plain_model import check_ids, check_tokens
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.evaluation.greedy import Continuation, greedy_texts
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.caches import keeps_keys_and_values, takes
from lightning_edit.passes.decoding import begin_id
from lightning_edit.passes.prefixes import SharedPrefix, shared_prefixes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Score", "continuations", "prompt_ids", "score_targets"]

_T = TypeVar("_T")
_Ids = tuple[int, ...]
_Row = tuple[_Ids, _Ids]  # a prompt, and its answer but for the last token

# A batch of this many tokens keeps a processor busy; from there on padding is what costs.
ENOUGH_TOKENS = 128
MAX_PADDING = 1.1  # times the tokens that are none
# Tokens whose keys and values are held at once, for each token that is run at once.
HELD_TOKENS = 4
# Models of which it was said that they are slow.
_TOLD: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Score:
    """How a model reads a given answer after a prompt.

    Args:
        target: Token ids of the answer.
        argmax: The model's own choice in each place, given the answer's tokens before it.
        log_probs: Log-probability of each token of the answer, in nats.
        first: Log-probabilities of the whole vocabulary in the first place, [V] float32 on the
            CPU, where they were asked for.
    """

    target: tuple[int, ...]
    argmax: tuple[int, ...]
    log_probs: tuple[float, ...]
    first: Tensor | None = None

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return -sum(self.log_probs) / len(self.log_probs)


@torch.no_grad()
def score_targets(
    model: PreTrainedModel,
    tokens: PromptTokenizer,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    with_first: Sequence[bool] | None = None,
    max_tokens: int = 2048,
) -> list[Score]:
    """Scores answers under teacher forcing, each distinct row of tokens once.

    A decoder reads each prompt once, whatever the number of its answers, whose tokens continue from
    the prompt's keys and values. Prompts are padded on the left with explicit positions, so that
    logits are computed for their last position only and models with absolute positions read what
    they would read unpadded. What several prompts begin with, such as the demonstrations of
    [`IKE`][lightning_edit.IKE], is read once for all of them, if it is long.

    Args:
        model: A Hugging Face language model.
        tokens: Its tokenizer.
        pairs: Token ids of prompts and of answers.
        with_first: For each pair, whether to keep the whole distribution of the first place.
        max_tokens: Tokens run at once.

    Returns:
        A score for each pair, in order.

    Raises:
        ModelError: If the pad or the end token is not in the model's embedding.
        RequestError: If another token is not.
    """
    check_tokens(model, tokens)
    check_ids(model, tokens, ((*prompt, *target) for prompt, target in pairs))
    # Answers of one token after the same prompt share a row.
    rows: dict[_Row, list[int]] = {}
    for i, (prompt, target) in enumerate(pairs):
        rows.setdefault((tuple(prompt), tuple(target[:-1])), []).append(i)
    run = _encoder_decoder_logits if tokens.is_encoder_decoder else _all_decoder_logits
    scores: list[Score | None] = [None] * len(pairs)
    with borrowed(model):
        for row, logits_KV in run(model, tokens, list(rows), max_tokens):
            logp_KV = torch.log_softmax(logits_KV.float(), dim=-1)
            argmax = tuple(logp_KV.argmax(-1).tolist())
            for i in rows[row]:
                target = list(pairs[i][1])
                ids = torch.tensor(target, device=logp_KV.device)
                wanted = with_first is not None and with_first[i]
                scores[i] = Score(
                    tuple(target),
                    argmax,
                    tuple(logp_KV.gather(1, ids[:, None])[:, 0].tolist()),
                    logp_KV[0].cpu() if wanted else None,
                )
    return [score for score in scores if score is not None]


def _all_decoder_logits(
    model: PreTrainedModel, tokens: PromptTokenizer, rows: Sequence[_Row], max_tokens: int
) -> Iterator[tuple[_Row, Tensor]]:
    """Logits of the places of each row's answer, [K, V], also where prompts begin alike."""
    if not keeps_keys_and_values(model):
        yield from _whole_logits(model, tokens, rows, max_tokens)
        return
    prefixes = _prefixes(model, tokens, [prompt for prompt, _ in rows])
    parts: dict[_Ids, list[_Row]] = {}
    for row in rows:
        parts.setdefault(prefixes.get(row[0], ()), []).append(row)
    yield from _decoder_logits(model, tokens, parts.pop((), []), max_tokens)
    for prefix, own in parts.items():
        yield from _logits_after(model, tokens, prefix, own, max_tokens)


def _prefixes(
    model: PreTrainedModel, tokens: PromptTokenizer, prompts: Sequence[_Ids]
) -> dict[_Ids, _Ids]:
    """Prompts that begin like others, and what can be read once for all of these."""
    memory = EditMemory.find(model)
    # A memory that looks at whole prompts has to see them whole.
    if tokens.is_encoder_decoder or (memory is not None and memory.is_hooked):
        return {}
    if not keeps_keys_and_values(model):
        return {}
    groups = shared_prefixes(prompts)
    return {prompt: prefix for prefix, group in groups.items() for prompt in group}


def _logits_after(
    model: PreTrainedModel,
    tokens: PromptTokenizer,
    beginning: _Ids,
    rows: Sequence[_Row],
    max_tokens: int,
) -> Iterator[tuple[_Row, Tensor]]:
    """Logits of rows whose prompts begin with the same tokens."""
    prefix, length = SharedPrefix(model, beginning), len(beginning)
    lengths = {row: len(row[0]) + len(row[1]) for row in rows}
    for batch in _batches(lengths, HELD_TOKENS * max_tokens, ENOUGH_TOKENS):
        ids, mask = pad_rows([[*row[0][length:], *row[1]] for row in batch], tokens.pad_id)
        ids, mask = ids.to(model.device), mask.to(model.device)
        whole = torch.cat([mask.new_ones(len(batch), length), mask], 1)
        first = min(len(prompt) for prompt, _ in batch) - length - 1
        keep = {"logits_to_keep": ids.shape[1] - first} if _keeps_logits(model) else {}
        logits_BKV = model(
            input_ids=ids,
            attention_mask=whole,
            position_ids=(whole.cumsum(1) - 1)[:, length:],
            cache=prefix.cache(len(batch)),
            use_cache=True,
            **keep,
        ).logits
        skipped = ids.shape[1] - logits_BKV.shape[1]
        for row, logits_KV in zip(batch, logits_BKV, strict=True):
            at = len(row[0]) - length - 1 - skipped
            yield row, logits_KV[at : at + len(row[1]) + 1]


def _whole_logits(
    model: PreTrainedModel, tokens: PromptTokenizer, rows: Sequence[_Row], max_tokens: int
) -> Iterator[tuple[_Row, Tensor]]:
    """Logits of the places of each row's answer, [K, V], of a model that cannot go on from a part.

    Padding stands behind, where nothing that is read can see it.
    """
    if model not in _TOLD:
        _TOLD.add(model)
        rank_zero_info(
            f"{type(model).__name__} hands on more than keys and values from position to position: "
            "whole rows are run where others go on from a cache. That is slower, and gives the "
            "same figures."
        )
    memory = EditMemory.find(model)
    lengths = {row: len(row[0]) + len(row[1]) for row in rows}
    for batch in _batches(lengths, max_tokens, ENOUGH_TOKENS):
        ids, mask = pad_rows([[*prompt, *forced] for prompt, forced in batch], tokens.pad_id)
        ends = [len(prompt) - 1 for prompt, _ in batch]
        keep = {"logits_to_keep": ids.shape[1] - min(ends)} if _keeps_logits(model) else {}
        told = [len(prompt) for prompt, _ in batch]
        with nullcontext() if memory is None else memory.prompts_of(told):
            logits_BKV = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                use_cache=False,
                **keep,
            ).logits
        skipped = ids.shape[1] - logits_BKV.shape[1]
        for row, end, logits_KV in zip(batch, ends, logits_BKV, strict=True):
            yield row, logits_KV[end - skipped : end - skipped + len(row[1]) + 1]


def _decoder_logits(
    model: PreTrainedModel, tokens: PromptTokenizer, rows: Sequence[_Row], max_tokens: int
) -> Iterator[tuple[_Row, Tensor]]:
    """Logits of the places of each row's answer, [K, V]: one more than it has forced tokens."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    keep = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    memory = EditMemory.find(model)
    answers: dict[_Ids, list[_Ids]] = {}
    for prompt, forced in rows:
        answers.setdefault(prompt, []).append(forced)
    begun: list[_Begun] = []
    for batch in _batches({prompt: len(prompt) for prompt in answers}, max_tokens, ENOUGH_TOKENS):
        longer = [(b, forced) for b, p in enumerate(batch) for forced in answers[p] if forced]
        ids, mask = (part.to(device) for part in pad_rows(batch, tokens.pad_id, side="left"))
        # With a cache a memory knows that rows are prompts.
        is_kept = bool(longer) or (memory is not None and memory.is_hooked)
        cache = DynamicCache() if is_kept else None
        logits_BV = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            cache=cache,
            use_cache=cache is not None,
            **keep,
        ).logits[:, -1]
        for b, prompt in enumerate(batch):
            if () in answers[prompt]:
                yield (prompt, ()), logits_BV[b : b + 1]
        if cache is not None and longer:
            owner = torch.tensor([b for b, _ in longer], device=device)
            named = [(batch[b], forced) for b, forced in longer]
            layers = [(layer.keys[owner], layer.values[owner]) for layer in cache.layers]
            route = None if memory is None else memory.route_of(cache)
            route = None if route is None else route[owner]
            begun.append(_Begun(named, logits_BV[owner], mask[owner], layers, route))
        # Few tokens at once would take as long as many: all weights are read for them.
        if sum(len(forced) for part in begun for _, forced in part.rows) >= ENOUGH_TOKENS:
            yield from _go_on(model, tokens, begun, max_tokens)
            begun = []
    if begun:
        yield from _go_on(model, tokens, begun, max_tokens)


@dataclass(frozen=True)
class _Begun:
    """Rows whose prompts have been read, each with a copy of what the prompt left.

    Args:
        rows: R prompts and forced tokens.
        first: Logits of the prompts' last positions, [R, V].
        mask: Attention masks of the prompts, padded on the left, [R, P].
        layers: Keys and values of each layer, [R, heads, P, width of a head].
        route: What the model's memory has decided for each row, [R], if it has one that decides.
    """

    rows: list[_Row]
    first: Tensor
    mask: Tensor
    layers: list[tuple[Tensor, Tensor]]
    route: Tensor | None = None

    def side(self, i: int, which: int, alike: Tensor) -> Tensor:
        """Keys (0) or values (1) of a layer; none, in the form of others, where it is lacking."""
        if i < len(self.layers):
            return self.layers[i][which]
        return alike.new_zeros(len(self.rows), *alike.shape[1:-2], 0, alike.shape[-1])


def _go_on(
    model: PreTrainedModel, tokens: PromptTokenizer, parts: Sequence[_Begun], max_tokens: int
) -> Iterator[tuple[_Row, Tensor]]:
    """Reads the forced tokens of answers whose prompts have been read."""
    from transformers import DynamicCache

    rows = [row for part in parts for row in part.rows]
    width = max(part.mask.shape[1] for part in parts)

    def joined(tensors: Sequence[Tensor], behind: int) -> Tensor:
        """Rows below one another, filled up on the left of their positions."""
        fill, most = (0, 0) * behind, max(t.shape[-1 - behind] for t in tensors)
        return torch.cat([pad(t, (*fill, most - t.shape[-1 - behind], 0)) for t in tensors])

    # A memory may have put layers of its own behind those of the model, where a row needed them.
    deepest = max(parts, key=lambda part: len(part.layers)).layers
    layers = [
        (
            joined([part.side(i, 0, deepest[i][0]) for part in parts], 1),
            joined([part.side(i, 1, deepest[i][1]) for part in parts], 1),
        )
        for i in range(len(deepest))
    ]
    first_RV = torch.cat([part.first for part in parts])
    memory, routes = EditMemory.find(model), [p.route for p in parts if p.route is not None]
    mask_RP = joined([part.mask for part in parts], 0)
    lengths = {r: len(forced) for r, (_, forced) in enumerate(rows)}
    for chosen in _batches(lengths, max_tokens, ENOUGH_TOKENS // 4):
        index = torch.tensor(chosen, device=mask_RP.device)
        cache = DynamicCache()
        for i, (keys, values) in enumerate(layers):
            cache.update(keys[index], values[index], i)
        if memory is not None and routes:
            memory.keep_route(cache, torch.cat(routes)[index])
        ids, more = pad_rows([rows[r][1] for r in chosen], tokens.pad_id)
        mask = torch.cat([mask_RP[index], more.to(index.device)], 1)
        logits_RFV = model(
            input_ids=ids.to(index.device),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1)[:, width:],
            cache=cache,
            use_cache=True,
        ).logits
        for r, rest_FV in zip(chosen, logits_RFV, strict=True):
            yield rows[r], torch.cat([first_RV[r : r + 1], rest_FV[: len(rows[r][1])]])


def _encoder_decoder_logits(
    model: PreTrainedModel, tokens: PromptTokenizer, rows: Sequence[_Row], max_tokens: int
) -> Iterator[tuple[_Row, Tensor]]:
    """Logits of the places of each row's answer, [K, V]: one more than it has forced tokens."""
    device, begin = next(model.parameters()).device, begin_id(model)
    lengths = {row: len(row[0]) + len(row[1]) for row in rows}
    for batch in _batches(lengths, max_tokens, ENOUGH_TOKENS):
        ids, mask = pad_rows([prompt for prompt, _ in batch], tokens.pad_id)
        read, _ = pad_rows([[begin, *forced] for _, forced in batch], tokens.pad_id)
        logits_BKV = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            decoder_input_ids=read.to(device),
            use_cache=False,
        ).logits
        for row, logits_KV in zip(batch, logits_BKV, strict=True):
            yield row, logits_KV[: len(row[1]) + 1]


def _batches(lengths: Mapping[_T, int], max_tokens: int, enough: int) -> Iterator[list[_T]]:
    """Items of like length together: with little padding once there are enough tokens."""
    batch: list[_T] = []
    filled = 0  # tokens that are no padding
    for item, length in sorted(lengths.items(), key=lambda entry: entry[1]):
        padded = (len(batch) + 1) * length
        loose = filled >= enough and padded > MAX_PADDING * (filled + length)
        if batch and (loose or padded > max_tokens):
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += length
    if batch:
        yield batch


def _keeps_logits(model: PreTrainedModel) -> bool:
    return takes(model, "logits_to_keep")


def prompt_ids(
    model: PreTrainedModel, tokens: PromptTokenizer, prompts: Sequence[str]
) -> dict[str, list[int]]:
    """Token ids of each prompt, as the model's memory has it asked, where there is one.

    Args:
        model: A Hugging Face language model.
        tokens: Its tokenizer.
        prompts: Texts to continue or questions to answer.
    """
    unique = list(dict.fromkeys(prompts))
    memory = EditMemory.find(model)
    with borrowed(model):
        asked = unique if memory is None else memory.rewrite(unique, tokens)
    return {prompt: tokens.prompt(text) for prompt, text in zip(unique, asked, strict=True)}


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokens: PromptTokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 24,
    min_new_tokens: Sequence[int] | None = None,
    max_rows: int = 128,
) -> list[Continuation]:
    """Greedy continuations from the prompts alone, up to a natural stop.

    A text stops at the end token, at a line's or a sentence's end, or after ``max_new_tokens``.
    Initials and abbreviations such as "Dr." end no sentence, nor in a chat does a call such as "Of
    course!" (see [`states_answer`][lightning_edit.functional.states_answer]).
    Nothing of the model's ``generation_config`` has a part in it but further end tokens.
    Equal prompts with equal minimums are run once.

    Args:
        model: A Hugging Face language model.
        tokens: Its tokenizer.
        prompts: Texts to continue or questions to answer.
        max_new_tokens: A generous cap.
        min_new_tokens: For each prompt, tokens before which a full stop does not end the text, so
            that "St. Petersburg" is not cut at its first.
        max_rows: Prompts run at once.

    Returns:
        For each prompt what was written, without the prompt.

    Raises:
        ModelError: If the pad or the end token is not in the model's embedding.
        RequestError: If another token is not.
    """
    asked = list(zip(prompts, min_new_tokens or [1] * len(prompts), strict=True))
    check_tokens(model, tokens)
    ids = prompt_ids(model, tokens, prompts)
    check_ids(model, tokens, ids.values())
    order = sorted(dict.fromkeys(asked), key=lambda item: len(ids[item[0]]))
    with borrowed(model):
        prefixes = _prefixes(model, tokens, [tuple(ids[prompt]) for prompt, _ in order])
        parts: dict[_Ids, list[tuple[str, int]]] = {}
        for item in order:
            parts.setdefault(prefixes.get(tuple(ids[item[0]]), ()), []).append(item)
        texts: dict[tuple[str, int], Continuation] = {}
        for beginning, items in parts.items():
            prefix = SharedPrefix(model, beginning) if beginning else None
            for chunk in _chunks(model, items, lambda item: len(ids[item[0]]), max_rows):
                written = greedy_texts(
                    model,
                    tokens,
                    [ids[p] for p, _ in chunk],
                    max_new_tokens,
                    [n for _, n in chunk],
                    prefix,
                )
                texts.update(zip(chunk, written, strict=True))
    return [texts[item] for item in asked]


def _chunks(
    model: PreTrainedModel, items: Sequence[_T], length: Callable[[_T], int], max_rows: int
) -> Iterator[Sequence[_T]]:
    """Prompts to continue at once; of one length where the model may not see past padding."""
    groups: dict[int, list[_T]] = {}
    for item in items:
        groups.setdefault(0 if keeps_keys_and_values(model) else length(item), []).append(item)
    for group in groups.values():
        for start in range(0, len(group), max_rows):
            yield group[start : start + max_rows]
