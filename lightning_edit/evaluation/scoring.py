# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a model says: batched teacher-forced scores and greedy continuations."""

# Shapes: B rows, T tokens, K positions whose logits are read, V vocabulary.

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_edit.core.batch import IGNORE_INDEX, PromptTokenizer, pad_rows

__all__ = ["Continuation", "Score", "continuations", "score_targets"]

SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")


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


@dataclass(frozen=True)
class Continuation:
    """What a model writes after a prompt.

    Args:
        text: The text up to its first line break, stripped.
        ids: All tokens it wrote, line breaks and an end token included.
    """

    text: str
    ids: tuple[int, ...]


@torch.no_grad()
def score_targets(
    model: Any,
    tokens: PromptTokenizer,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    with_first: Sequence[bool] | None = None,
    max_tokens: int = 2048,
) -> list[Score]:
    """Scores answers under teacher forcing, each distinct row of tokens once.

    Rows are padded on the left with explicit positions, so that logits are computed for the last
    few positions only and models with absolute positions read what they would read unpadded.

    Args:
        model: A Hugging Face language model.
        tokens: Its tokenizer.
        pairs: Token ids of prompts and of answers.
        with_first: For each pair, whether to keep the whole distribution of the first place.
        max_tokens: Tokens run at once.

    Returns:
        A score for each pair, in order.
    """
    # Answers of one token after the same prompt share a row.
    rows: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for i, (prompt, target) in enumerate(pairs):
        rows.setdefault((tuple(prompt), tuple(target[:-1])), []).append(i)
    scores: list[Score | None] = [None] * len(pairs)
    for batch in _batches(list(rows), max_tokens):
        keep = max(len(forced) for _, forced in batch) + 1
        logits_BKV = _last_logits(model, tokens, batch, keep)
        width = logits_BKV.shape[1]
        for b, row in enumerate(batch):
            for i in rows[row]:
                prompt, target = pairs[i]
                n = len(target)
                logp_nV = torch.log_softmax(logits_BKV[b, width - n :].float(), dim=-1)
                ids = torch.tensor(list(target), device=logp_nV.device)
                wanted = with_first is not None and with_first[i]
                scores[i] = Score(
                    tuple(target),
                    tuple(logp_nV.argmax(-1).tolist()),
                    tuple(logp_nV.gather(1, ids[:, None])[:, 0].tolist()),
                    logp_nV[0].cpu() if wanted else None,
                )
    return [score for score in scores if score is not None]


def _batches(
    rows: list[tuple[tuple[int, ...], tuple[int, ...]]], max_tokens: int
) -> Iterator[list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Rows of like length together, as many as fit."""
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    batch: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for row in rows:
        if batch and (len(batch) + 1) * (len(row[0]) + len(row[1])) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _last_logits(
    model: Any,
    tokens: PromptTokenizer,
    rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    keep: int,
) -> Tensor:
    """Logits of the last ``keep`` positions, right-aligned, [B, K, V]."""
    device = next(model.parameters()).device
    if tokens.is_encoder_decoder:
        ids, mask = pad_rows([prompt for prompt, _ in rows], tokens.pad_id)
        # A label for each forced token and one more; the decoder's inputs are made from them.
        labels, label_mask = pad_rows(
            [[*forced, tokens.pad_id] for _, forced in rows], IGNORE_INDEX
        )
        logits = model(
            input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)
        ).logits
        lengths = label_mask.sum(1).tolist()
        width = logits.shape[1]
        return torch.stack([torch.roll(logits[b], width - n, 0) for b, n in enumerate(lengths)])
    ids, mask = pad_rows([[*p, *f] for p, f in rows], tokens.pad_id, side="left")
    arguments = {"logits_to_keep": keep} if _keeps_logits(model) else {}
    logits_BKV: Tensor = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(1) - 1).clamp_min(0).to(device),
        use_cache=False,
        **arguments,
    ).logits
    return logits_BKV[:, -keep:]


def _keeps_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@torch.no_grad()
def continuations(
    model: Any,
    tokens: PromptTokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 24,
    min_new_tokens: Sequence[int] | None = None,
    max_rows: int = 128,
) -> list[Continuation]:
    """Greedy continuations from the prompts alone, up to a natural stop.

    A text stops at the end token, at a line's or a sentence's end, or after ``max_new_tokens``.
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
    """
    asked = list(zip(prompts, min_new_tokens or [1] * len(prompts), strict=True))
    ids = {prompt: tokens.prompt(prompt) for prompt in dict.fromkeys(prompts)}
    order = sorted(dict.fromkeys(asked), key=lambda item: len(ids[item[0]]))
    texts: dict[tuple[str, int], Continuation] = {}
    for start in range(0, len(order), max_rows):
        chunk = order[start : start + max_rows]
        written = _generate(
            model, tokens, [ids[p] for p, _ in chunk], max_new_tokens, [n for _, n in chunk]
        )
        texts.update(zip(chunk, written, strict=True))
    return [texts[item] for item in asked]


def _generate(
    model: Any,
    tokens: PromptTokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    least: Sequence[int],
) -> list[Continuation]:
    from transformers import StoppingCriteria, StoppingCriteriaList

    tokenizer = tokens.tokenizer
    device = next(model.parameters()).device
    side = "right" if tokens.is_encoder_decoder else "left"
    ids, mask = pad_rows(prompts, tokens.pad_id, side=side)
    begin = 1 if tokens.is_encoder_decoder else ids.shape[1]
    ends = {i for i in (tokens.eos_id,) if i is not None}
    done = [False] * len(prompts)
    pieces = [""] * len(prompts)
    lengths = [max_new_tokens] * len(prompts)

    class NaturalStop(StoppingCriteria):  # type: ignore[misc, unused-ignore]
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            count = input_ids.shape[1] - begin
            for b, piece in enumerate(tokenizer.batch_decode(input_ids[:, -1:])):
                if not done[b]:
                    pieces[b] += piece
                    text = pieces[b].lstrip()
                    at_end = text.rstrip().endswith(SENTENCE_ENDS) and count >= least[b]
                    done[b] = "\n" in text or (bool(text) and at_end)
                    lengths[b] = count
            return torch.tensor(done, device=input_ids.device)

    output = model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        temperature=None,
        top_k=None,
        top_p=None,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokens.pad_id,
        stopping_criteria=StoppingCriteriaList([NaturalStop()]),
    )
    written: list[Continuation] = []
    for b, row in enumerate(output[:, begin:].tolist()):
        own = row[: lengths[b]]  # behind a stop there is only padding
        end = next((i for i, token in enumerate(own) if token in ends), len(own))
        text = tokenizer.decode(own[:end], skip_special_tokens=True)
        kept = tuple(own[: end + 1])  # with an end token that was written
        written.append(Continuation(_up_to_stop(text, pieces[b], done[b]), kept))
    return written


def _up_to_stop(text: str, seen: str, stopped: bool) -> str:
    """The text without what padding or a last token brought behind the stop."""
    kept = text.lstrip("\n")
    kept = kept.lstrip().split("\n")[0] if kept.strip() else ""
    limit = len(seen.strip().split("\n")[0]) if stopped else len(kept)
    return kept[:limit].rstrip()
