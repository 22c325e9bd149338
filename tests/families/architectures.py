# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the architectures that people use, over the tiny tokenizer's vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightning_edit.demos import tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ARCHITECTURES", "build"]

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
_HEADS = {**_LLAMA, "head_dim": 8}
_NEOX = {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.1}
_T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "init_std": 0.1,
    "forced_eos_token_id": None,
}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_ROUTED = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN_VISION = {"depth": 1, "num_heads": 2, "patch_size": 4, "intermediate_size": 32}
_QWEN_VL = {
    **_LLAMA,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
    },
}

#: Name to the class of its configuration and what makes it tiny; a wrapper's language part under
#: ``text_config``.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # decoders of attention and multilayer perceptrons
    "llama": ("LlamaConfig", _LLAMA),
    "mistral": ("MistralConfig", _LLAMA),
    "ministral3": ("Ministral3Config", _HEADS),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", _HEADS),
    "gemma": ("GemmaConfig", _HEADS),
    "gemma2": ("Gemma2Config", _HEADS),
    "gemma3": ("Gemma3TextConfig", _HEADS),
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            **_HEADS,
            "num_hidden_layers": 4,
            "intermediate_size": 64,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 424,
            "laurel_rank": 4,
            "num_kv_shared_layers": 2,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **_HEADS,
            "num_hidden_layers": 4,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 424,
            "global_head_dim": 8,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gpt2": ("GPT2Config", _GPT),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "gptneox": ("GPTNeoXConfig", _NEOX),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 128,
            "attention_types": [[["global"], 2]],
        },
    ),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconConfig", {**_NEOX, "alibi": False}),
    "mpt": (
        "MptConfig",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2},
    ),
    "phi": ("PhiConfig", _NEOX),
    "phi3": ("Phi3Config", _NEOX),
    "cohere": ("CohereConfig", _LLAMA),
    "cohere2": ("Cohere2Config", _LLAMA),
    "granite": ("GraniteConfig", _LLAMA),
    "glm4": ("Glm4Config", _HEADS),
    "olmo2": ("Olmo2Config", _LLAMA),
    "olmo3": ("Olmo3Config", _LLAMA),
    "smollm3": ("SmolLM3Config", _LLAMA),
    "starcoder2": ("Starcoder2Config", _LLAMA),
    "stablelm": ("StableLmConfig", _LLAMA),
    "nemotron": ("NemotronConfig", _LLAMA),
    "helium": ("HeliumConfig", _HEADS),
    "exaone4": ("Exaone4Config", _LLAMA),
    "ernie4_5": ("Ernie4_5Config", _LLAMA),
    "hunyuan": ("HunYuanDenseV1Config", _HEADS),
    "seed_oss": ("SeedOssConfig", _HEADS),
    "apertus": ("ApertusConfig", _LLAMA),
    "arcee": ("ArceeConfig", _LLAMA),
    "bitnet": ("BitNetConfig", _LLAMA),
    "nanochat": ("NanoChatConfig", _LLAMA),
    # linear attention, state spaces, convolutions, and mixtures of them with attention
    "qwen3_5": ("Qwen3_5TextConfig", {**_HEADS, **_DELTA}),
    "qwen3_next": ("Qwen3NextConfig", {**_HEADS, **_DELTA, **_ROUTED, "mlp_only_layers": [0]}),
    "granite4": (
        "GraniteMoeHybridConfig",
        {
            **_LLAMA,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            **_MAMBA,
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        {**_HEADS, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, **_MAMBA},
    ),
    "bamba": (
        "BambaConfig",
        {**_LLAMA, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, **_MAMBA},
    ),
    "jamba": (
        "JambaConfig",
        {
            **_LLAMA,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "num_experts": 2,
            "use_mamba_kernels": False,
            "mamba_dt_rank": 4,
            **_MAMBA,
        },
    ),
    "zamba2": (
        "Zamba2Config",
        {
            **_LLAMA,
            "num_key_value_heads": 4,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "layers_block_type": ["mamba", "hybrid"],
            "hybrid_layer_ids": [1],
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "adapter_rank": 4,
            **_MAMBA,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        {**_LLAMA, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **_HEADS,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 8,
        },
    ),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": (
        "Mamba2Config",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
        },
    ),
    "falcon_mamba": (
        "FalconMambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**_LLAMA, "lru_width": 32, "num_hidden_layers": 3, "attention_window_size": 16},
    ),
    "rwkv": (
        "RwkvConfig",
        {
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "context_length": 128,
        },
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        {
            **_LLAMA,
            **_MLA,
            **_ROUTED,
            "q_lora_rank": None,
            "head_dim": 8,
            "first_k_dense_replace": 1,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    # mixtures of experts
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_LLAMA, **_ROUTED, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_HEADS, **_ROUTED}),
    "gpt_oss": ("GptOssConfig", {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_LLAMA,
            **_MLA,
            **_ROUTED,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "deepseek_v32": (
        "DeepseekV32Config",
        {
            **_LLAMA,
            **_MLA,
            **_ROUTED,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "index_topk": 64,
            "index_n_heads": 2,
            "index_head_dim": 16,
        },
    ),
    "olmoe": ("OlmoeConfig", {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": (
        "GraniteMoeConfig",
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            **_HEADS,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {**_HEADS, **_ROUTED, "n_routed_experts": 4, "first_k_dense_replace": 1},
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    ),
    "phimoe": ("PhimoeConfig", {**_LLAMA, "num_local_experts": 4}),
    # encoders with decoders
    "t5": ("T5Config", _T5),
    "flan_t5": ("T5Config", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "switch": (
        "SwitchTransformersConfig",
        {**_T5, "num_decoder_layers": 2, "num_experts": 4, "num_sparse_decoder_layers": 1},
    ),
    "bart": ("BartConfig", _BART),
    "mbart": ("MBartConfig", _BART),
    "marian": ("MarianConfig", _BART),
    "t5gemma": ("T5GemmaConfig", {"encoder": _HEADS, "decoder": _HEADS, "dropout_rate": 0.0}),
    # language parts of models that see
    "gemma3_mm": ("Gemma3Config", {"text_config": _HEADS, "vision_config": _VISION}),
    "llava": (
        "LlavaConfig",
        {"text_config": {"model_type": "llama", **_LLAMA}, "vision_config": _VISION},
    ),
    "qwen2_vl": (
        "Qwen2VLConfig",
        {
            "text_config": _QWEN_VL,
            "vision_config": {**_QWEN_VISION, "embed_dim": 16, "hidden_size": 32},
        },
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {
            "text_config": {**_QWEN_VL, "head_dim": 8},
            "vision_config": {
                **_QWEN_VISION,
                "hidden_size": 16,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
            },
        },
    ),
    # encoders alone
    "bert": ("BertConfig", _BERT),
    "roberta": ("RobertaConfig", _BERT),
    "distilbert": ("DistilBertConfig", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    "modernbert": ("ModernBertConfig", _BERT),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model of an architecture: float32, eval mode, random weights by seed."""
    import transformers

    tokenizer = tiny_tokenizer()
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
    }
    kind, sizes = ARCHITECTURES[name]
    cls = getattr(transformers, kind)
    parts = {"text_config", "encoder", "decoder"} & set(sizes)
    if parts:
        sizes = {k: {**v, **tokens} if k in parts else v for k, v in sizes.items()}
        if "encoder" in parts:
            sizes |= tokens
        config = cls(**sizes)
    else:
        config = cls(**sizes, **tokens)
    if config.is_encoder_decoder and not parts:
        config.decoder_start_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _auto(config).from_config(config).eval()
        with torch.no_grad():
            # Biases of zero and norms of one would hide a mistake with either.
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _auto(config: Any) -> Any:
    import transformers

    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForMaskedLM,
    ):
        if type(config) in auto._model_mapping:
            return auto
    raise AssertionError(f"there is no language model of {type(config).__name__}")
