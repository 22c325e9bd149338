# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Which edits changed an answer: each is taken out by itself, and the answer measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import LedgerError
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.sharding import local_shard, shard_like
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.core.wrappers import plain_parameters
from lightning_edit.evaluation.evaluator import Evaluator
from lightning_edit.evaluation.scoring import prompt_ids, score_targets
from lightning_edit.ledger.fingerprints import fingerprint
from lightning_edit.ledger.history import History, Standing
from lightning_edit.ledger.outcomes import Blamed, BlameRow
from lightning_edit.ledger.undo import forget, held
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.targets import kept_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from lightning_edit.ledger.ledger import Ledger

__all__ = ["blame"]


def blame(
    ledger: Ledger,
    target: nn.Module,
    prompt: str,
    tokenizer: PreTrainedTokenizerBase | PromptTokenizer | None,
    *,
    answer: str,
    threshold: float,
) -> Blamed:
    """Which edits changed the answer to a prompt; see ``Ledger.blame``."""
    model = cast("PreTrainedModel", held(target))
    tokens = _tokens(target, model, tokenizer)
    standing = History(ledger.entries()).at(fingerprint(model)).standing
    if not standing:
        raise LedgerError(
            f"`{ledger.path}` knows no edit in this model: it has none, or something else was "
            "changed in it since."
        )
    says = Evaluator(model, tokens).continuations([prompt])[0].strip()
    asked = answer or says
    if not asked:
        raise LedgerError(
            f"The model says nothing to {prompt!r}. Give the `answer` whose probability is to be "
            "measured."
        )
    p, rows = _probability(model, tokens, prompt, asked), []
    for one in standing:
        if not one.entry.delta:
            continue
        with _without(model, ledger.deltas.load(one.entry.delta), one):
            without = _probability(model, tokens, prompt, asked)
            other = Evaluator(model, tokens).continuations([prompt])[0].strip()
        is_cause = other != says or abs(p - without) >= threshold
        rows.append(BlameRow(one.entry, without, other, is_cause))
    rows.sort(key=lambda row: (not row.is_cause, -abs(p - row.p_without), row.entry.id))
    return Blamed(prompt, asked, p, tuple(rows))


def _tokens(
    target: nn.Module,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | PromptTokenizer | None,
) -> PromptTokenizer:
    if isinstance(target, EditModule):
        return target.tokens
    if tokenizer is None:
        raise LedgerError("Give the model's `tokenizer`, or an editor, which has one.")
    if isinstance(tokenizer, PromptTokenizer):
        return tokenizer
    is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    return PromptTokenizer(tokenizer, is_encoder_decoder=is_encoder_decoder)


def _probability(
    model: PreTrainedModel, tokens: PromptTokenizer, prompt: str, answer: str
) -> float:
    """Geometric mean of the probabilities of an answer's tokens."""
    ids = prompt_ids(model, tokens, [prompt])[prompt]
    [score] = score_targets(model, tokens, [(ids, tokens.target(prompt, answer))])
    return math.exp(-score.nll)


@contextmanager
def _without(model: nn.Module, delta: Edit, one: Standing) -> Iterator[None]:
    """Context manager: the model without one edit, and then as it was, bit for bit."""
    if isinstance(delta, WeightDelta):
        named = plain_parameters(model)
        parameters = {name: named[name] for name in delta.changes}
        with kept_weights(parameters):
            with torch.no_grad():
                for name, parameter in parameters.items():
                    weight = local_shard(parameter)
                    change = shard_like(parameter, delta.dense(name).to(weight.device))
                    weight.copy_(weight.float() - change)
            yield
        return
    memory = EditMemory.find(model)
    kept = {} if memory is None else memory.entries
    try:
        forget(model, cast(MemoryWrite, delta), [request.id for request in one.requests])
        yield
    finally:
        if memory is not None:
            if EditMemory.find(model) is None:
                memory.attach_(model)
            memory.write(kept)
