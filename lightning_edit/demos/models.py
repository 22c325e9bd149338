# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Tiny models and a tokenizer for the world of the demonstrations."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Literal

import torch

from lightning_edit.core.errors import ModelError
from lightning_edit.demos.world import world_sentences

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["TinyKind", "tiny_model", "tiny_tokenizer", "trained_tiny_model"]

TinyKind = Literal["llama", "gpt2", "t5"]

# Small enough that some names are one token and others several.
_VOCABULARY = 424
_WEIGHTS = "tiny_llama.safetensors"
_WEIGHTS_SHA256 = "a9270a53cb2af2be38b5490bd5f21e6dc2cadbdb9fc98487e45bbb5b2d7296c9"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the world's sentences, made in milliseconds.

    As in GPT-2 a word carries the space before it, and any text can be encoded. There is an end
    token, a pad token of its own and no token for the beginning.

    Examples:
        >>> tokenizer = tiny_tokenizer()
        >>> tokenizer.tokenize("The capital of Dorin")
        ['The', 'Ġcapital', 'Ġof', 'ĠDorin']
        >>> tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token
        ('<pad>', '<end>', None)
    """
    return copy.deepcopy(_tokenizer())


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{p} {a}. {p}" for p, a in world_sentences()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128)
    fast.add_special_tokens({"pad_token": "<pad>", "eos_token": "<end>"})
    return fast


def tiny_model(kind: TinyKind = "llama", seed: int = 0) -> PreTrainedModel:
    """A model of four layers and random weights, for the tokenizer of ``tiny_tokenizer``.

    Args:
        kind: Architecture: ``llama`` (gated MLP), ``gpt2`` (transposed weights) or ``t5``
            (encoder-decoder).
        seed: Of the weights. The global random state is left alone.

    Returns:
        The model in float32 and eval mode.

    Raises:
        ModelError: If the kind is not one of these.

    Examples:
        >>> model = tiny_model()
        >>> model.config.num_hidden_layers, model.config.hidden_size
        (4, 32)
    """
    return copy.deepcopy(_model(kind, seed))


@functools.cache
def _model(kind: str, seed: int) -> PreTrainedModel:
    import transformers

    tokens: dict[str, int | None] = {
        "vocab_size": _VOCABULARY,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    match kind:
        case "llama":
            config = transformers.LlamaConfig(
                hidden_size=32,
                intermediate_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                tie_word_embeddings=True,
                **tokens,
            )
        case "gpt2":
            config = transformers.GPT2Config(
                n_embd=32,
                n_layer=4,
                n_head=4,
                n_positions=128,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **tokens,
            )
        case "t5":
            config = transformers.T5Config(
                d_model=32,
                d_ff=128,
                d_kv=8,
                num_layers=4,
                num_heads=4,
                dropout_rate=0.0,
                decoder_start_token_id=0,
                **tokens,
            )
        case _:
            raise ModelError(f"`kind` is expected to be llama, gpt2 or t5, but got {kind!r}.")
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    with torch.random.fork_rng(devices=[]), _plain_tensors():
        torch.manual_seed(seed)
        return auto.from_config(config).eval()


def trained_tiny_model() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The tiny Llama with trained weights, which answers every sentence of the world rightly.

    The weights come with the package and are not trained anew, as each instruction set would
    train them a little differently. Each call returns a model of its own. Every token of every
    answer has a probability of 0.95 or more.

    Returns:
        The model, in float32 and eval mode, and its tokenizer.

    Raises:
        ModelError: If the file of weights is not the one that was published.

    Examples:
        >>> model, tokenizer = trained_tiny_model()
        >>> prompt = tokenizer("The capital of Velmora is", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**prompt, max_new_tokens=8)[0])
        'The capital of Velmora is Dorin.<end>'
    """
    return copy.deepcopy(_trained()), tiny_tokenizer()


@functools.cache
def _trained() -> PreTrainedModel:
    from safetensors.torch import load_model

    with _plain_tensors(), as_file(files("lightning_edit.demos") / _WEIGHTS) as path:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != _WEIGHTS_SHA256:
            raise ModelError(
                f"{path} has the SHA-256 {digest}, but the weights that were published have "
                f"{_WEIGHTS_SHA256}: install lightning_edit again."
            )
        model = tiny_model()
        load_model(model, path)
    return model


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Context manager: what is in force around the first call is not to be in all copies."""
    with torch.inference_mode(False), torch.device("cpu"):
        yield
