# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a model writes under settings of our own, none of which are taken from the model."""

# Shapes: B rows, T tokens of a prompt.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import Cache, GenerationConfig, PreTrainedModel, StoppingCriteria

__all__ = [
    "GREEDY",
    "begin_id",
    "decoder_inputs",
    "end_ids",
    "sampling",
    "write",
    "written_by",
]

#: The likeliest token each time.
GREEDY: Mapping[str, object] = {"do_sample": False, "num_beams": 1}


def sampling(top_k: int = 0) -> Mapping[str, object]:
    """Settings by which tokens are drawn as the model has them.

    Args:
        top_k: Draw from the likeliest tokens alone, so many of them; from all if 0.
    """
    return {
        "do_sample": True,
        "num_beams": 1,
        "temperature": 1.0,
        "top_k": top_k,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
    }


def end_ids(model: PreTrainedModel, tokens: PromptTokenizer) -> list[int]:
    """Tokens that end a text: the tokenizer's, and what else of its special tokens the model names.

    Args:
        model: A Hugging Face language model.
        tokens: Its tokenizer.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = [named] if isinstance(named, int) else list(named or ())
    special = set(tokens.tokenizer.all_special_ids)
    # Those of a chat template, such as one for the end of a turn, are only added tokens.
    special |= set(getattr(tokens.tokenizer, "added_tokens_decoder", {}))
    own = [] if tokens.eos_id is None else [tokens.eos_id]
    return list(dict.fromkeys([*own, *(token for token in named if token in special)]))


def begin_id(model: PreTrainedModel) -> int:
    """The token that a decoder with an encoder before it begins with.

    Raises:
        ModelError: If the model's configuration names none.
    """
    sources = (model.config, getattr(model, "generation_config", None))
    for name in ("decoder_start_token_id", "bos_token_id"):
        for source in sources:
            token = getattr(source, name, None)
            if token is not None:
                return int(token)
    raise ModelError(
        f"The configuration of {type(model).__name__} does not say which token its decoder begins "
        "with. Set `model.config.decoder_start_token_id`, such as to the code of the language that "
        "it is to write."
    )


def decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """What a decoder reads while it predicts some labels: its first token, and those before.

    Args:
        model: A Hugging Face encoder-decoder model.
        labels: Tokens, and −100 for those that are not predicted, [B, T].

    Returns:
        Token ids, [B, T].
    """
    begun = torch.full_like(labels[:, :1], begin_id(model))
    padding = getattr(model.config, "pad_token_id", None) or 0
    return torch.cat([begun, labels[:, :-1].masked_fill(labels[:, :-1] < 0, padding)], 1)


def written_by(
    model: PreTrainedModel, tokens: PromptTokenizer, settings: Mapping[str, object]
) -> GenerationConfig:
    """A generation configuration in which nothing but these settings and special tokens is set.

    Args:
        model: A Hugging Face language model.
        tokens: Its tokenizer.
        settings: What is set.
    """
    from transformers import GenerationConfig

    begin = begin_id(model) if tokens.is_encoder_decoder else None
    return GenerationConfig(
        **settings,
        pad_token_id=tokens.pad_id,
        eos_token_id=end_ids(model, tokens) or None,
        decoder_start_token_id=begin,
    )


def write(
    model: PreTrainedModel,
    tokens: PromptTokenizer,
    ids: Tensor,
    mask: Tensor,
    settings: Mapping[str, object],
    *,
    stop: Sequence[StoppingCriteria] = (),
    cache: Cache | None = None,
) -> Tensor:
    """Has a model go on with some rows.

    transformers fills what a configuration leaves open from the model's own, which therefore is out
    of sight meanwhile.

    Args:
        model: A Hugging Face language model.
        tokens: Its tokenizer.
        ids: Token ids, [B, T].
        mask: 1 where they are no padding, [B, T].
        settings: ``GREEDY`` or ``sampling``, with how much is written.
        stop: What else ends a row than an end token.
        cache: Keys and values of what the rows begin with.

    Returns:
        What was read by a decoder-only model, and what was written; all of the decoder's tokens
        where the model has an encoder.
    """
    from transformers import StoppingCriteriaList

    config = written_by(model, tokens, settings)
    more = {} if cache is None else {"cache": cache}
    with _configured(model, config):
        written: Tensor = model.generate(
            ids,
            generation_config=config,
            attention_mask=mask,
            stopping_criteria=StoppingCriteriaList(stop),
            **more,
        )
    return written


@contextmanager
def _configured(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Context manager: a model, and models that it wraps, with another generation configuration."""
    name = "generation_config"
    kept = [(module, vars(module)[name]) for module in model.modules() if name in vars(module)]
    try:
        for module, _ in kept:
            setattr(module, name, config)
        yield
    finally:
        for module, own in kept:
            setattr(module, name, own)
