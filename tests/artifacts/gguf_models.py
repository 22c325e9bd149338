# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Tiny models as GGUF files in float32, which a real server of llama.cpp loads in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from lightning_edit.demos import tiny_tokenizer

__all__ = ["save_model_as_gguf"]

_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def save_model_as_gguf(model: Any, path: Path) -> Path:
    """Writes a Llama or GPT-2 over the vocabulary of the tiny tokenizer."""
    config = model.config
    kind = {"llama": gguf.MODEL_ARCH.LLAMA, "gpt2": gguf.MODEL_ARCH.GPT2}[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "llama":
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found = names.get_name(name, (".weight", ".bias"))
        assert found is not None, name
        if name.startswith("lm_head") and tied:
            continue
        writer.add_tensor(found, _as_stored(name, parameter.detach(), config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_stored(name: str, weight: Tensor, config: Any) -> Tensor:
    module = name.split(".")[-2]
    if config.model_type == "gpt2" and module in ("c_attn", "c_proj", "c_fc") and weight.ndim == 2:
        weight = weight.T
    if config.model_type == "llama" and module in _HEADS:
        heads = getattr(config, _HEADS[module])
        size = len(weight) // heads
        # Written out, row by row: pairs i and i + size / 2 come to lie side by side.
        rows = [
            head * size + half * size // 2 + i
            for head in range(heads)
            for i in range(size // 2)
            for half in (0, 1)
        ]
        weight = weight[rows]
    return weight.contiguous().float()


def _add_tokenizer(writer: Any, size: int) -> None:
    parts = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = sorted(parts["model"]["vocab"], key=parts["model"]["vocab"].__getitem__)
    assert len(vocabulary) == size
    special = {"<pad>", "<end>"}
    kinds = [
        gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL
        for token in vocabulary
    ]
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_pad_token_id(vocabulary.index("<pad>"))
    writer.add_eos_token_id(vocabulary.index("<end>"))
    writer.add_bos_token_id(vocabulary.index("<end>"))
    writer.add_add_bos_token(False)


def logprobs(model: Any, ids: list[int]) -> Tensor:
    """Of the next token after each of a prompt's, shape [T, V]."""
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return found
