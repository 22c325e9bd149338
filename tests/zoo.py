# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of many architectures, all over the vocabulary of the tiny tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_edit.demos import tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DECODERS", "ENCODER_DECODERS", "EXPERTS", "KINDS", "LAYERS", "build"]

LAYERS = 3
DECODERS = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt2",
    "gptj",
    "gptneox",
    "opt",
    "phi",
    "phi3",
    "falcon",
)
ENCODER_DECODERS = ("t5", "flan_t5", "bart")
KINDS = DECODERS + ENCODER_DECODERS
EXPERTS = ("mixtral", "deepseek")

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
_NEOX = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
_GPT = {
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.1,
}
_T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": LAYERS, "num_heads": 4}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

# Name of the configuration class, and what makes it tiny.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 16}),
    "mistral": ("MistralConfig", _LLAMA),
    "gemma2": ("Gemma2Config", {**_LLAMA, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA, "head_dim": 16}),
    "gpt2": ("GPT2Config", _GPT | _NO_DROPOUT),
    "gptj": ("GPTJConfig", {**_GPT, **_NO_DROPOUT, "rotary_dim": 4}),
    "gptneox": ("GPTNeoXConfig", _NEOX),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "dropout": 0.0,
            "init_std": 0.1,
        },
    ),
    "phi": ("PhiConfig", _NEOX),
    "phi3": ("Phi3Config", _NEOX),
    "falcon": ("FalconConfig", {**_NEOX, "alibi": False}),
    "t5": ("T5Config", {**_T5, "dropout_rate": 0.0}),
    "flan_t5": (
        "T5Config",
        {
            **_T5,
            "dropout_rate": 0.0,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
    ),
    "bart": (
        "BartConfig",
        {
            "d_model": 32,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 128,
            "dropout": 0.0,
            "init_std": 0.1,
            "forced_eos_token_id": None,
        },
    ),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4}),
    "deepseek": (
        "DeepseekV3Config",
        {
            **_LLAMA,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}


def build(kind: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model of one kind: float32, eval mode, random weights by seed."""
    import transformers

    tokenizer = tiny_tokenizer()
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    name, sizes = _CONFIGS[kind]
    if kind in ENCODER_DECODERS:
        tokens["decoder_start_token_id"] = tokenizer.pad_token_id
        auto = transformers.AutoModelForSeq2SeqLM
    else:
        auto = transformers.AutoModelForCausalLM
    config = getattr(transformers, name)(**sizes, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config).eval()
        with torch.no_grad():
            # Biases of zero and norms of one would hide a mistake with either.
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
