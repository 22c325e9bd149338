# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods as evaluation harnesses ask for them, with a model's edits in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.evaluation.scoring import prompt_ids, score_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["log_likelihoods"]


def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str]],
    *,
    max_tokens: int = 2048,
) -> list[tuple[float, bool]]:
    """Log-likelihoods of continuations, as lm-eval's ``loglikelihood`` returns them.

    A memory is told where the contexts end, and asked for the prompt in their place where its edits
    are prompts.

    Args:
        model: A Hugging Face language model, with a memory or without.
        tokenizer: Its fast tokenizer.
        pairs: Contexts and continuations. The text that is scored is one after the other, with what
            white space there is in them.
        max_tokens: Tokens run at once.

    Returns:
        For each pair the sum of the continuation's log-probabilities, in nats, and whether each of
        its tokens is the model's own choice.

    Examples:
        >>> from lightning_edit.demos import trained_tiny_model
        >>> model, tokenizer = trained_tiny_model()
        >>> pairs = [("The capital of Velmora is", f" {name}") for name in ("Dorin", "red")]
        >>> [is_greedy for _, is_greedy in log_likelihoods(model, tokenizer, pairs)]
        [True, False]
    """
    tokens = PromptTokenizer(
        tokenizer, is_encoder_decoder=bool(getattr(model.config, "is_encoder_decoder", False))
    )
    asked = prompt_ids(model, tokens, [context for context, _ in pairs])
    begin = [tokens.pad_id if tokens.eos_id is None else tokens.eos_id]
    rows = [(asked[c] or begin, tokens.target(c, text, glued=True)) for c, text in pairs]
    scores = score_targets(model, tokens, rows, max_tokens=max_tokens)
    return [(sum(score.log_probs), score.argmax == score.target) for score in scores]
