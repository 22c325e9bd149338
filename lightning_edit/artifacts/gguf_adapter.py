# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in the format of llama.cpp, a GGUF file."""

# Shapes: R rank, I inputs, O outputs of a linear map, H heads.

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_edit.core.errors import ArtifactError, MissingDependencyError
from lightning_edit.core.lora import LoRAFactors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ARCHITECTURES", "check_gguf", "save_gguf"]


class _Architecture(NamedTuple):
    """What llama.cpp makes of an architecture of transformers.

    Args:
        name: Of the architecture in GGUF files.
        is_permuted: Whether the rows of queries and keys are in another order there, since its
            rotary embedding turns neighbours where that of transformers turns halves.
    """

    name: str
    is_permuted: bool = False


#: By the ``model_type`` of a configuration: those that transformers reads from GGUF, too.
ARCHITECTURES = {
    "gemma2": _Architecture("gemma2"),
    "gemma3_text": _Architecture("gemma3"),
    "gpt2": _Architecture("gpt2"),
    "llama": _Architecture("llama", is_permuted=True),
    "mistral": _Architecture("llama", is_permuted=True),
    "phi3": _Architecture("phi3"),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
}


def check_gguf(config: PretrainedConfig) -> None:
    """Checks that an adapter of a model can be written as GGUF.

    Raises:
        ArtifactError: If the architecture is none of ``ARCHITECTURES``.
        MissingDependencyError: If the package gguf is not installed.
    """
    if config.model_type not in ARCHITECTURES:
        raise ArtifactError(
            f"Adapters of `{config.model_type}` are not written as GGUF; those of "
            f"{', '.join(ARCHITECTURES)} are. Export to `lora`, and convert that with the script "
            "`convert_lora_to_gguf.py` of llama.cpp."
        )
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError("gguf", "default-model", "Writing an adapter as GGUF")


def save_gguf(factors: Mapping[str, LoRAFactors], config: PretrainedConfig, path: Path) -> None:
    """Writes LoRA factors as a file that ``llama-server --lora`` reads.

    llama.cpp scales each module by alpha / rank, with one alpha for all. It is the usual rank, and
    B of a module of another rank is scaled to make up for that.

    Args:
        factors: Module name to factors, as ``core.lora.to_lora`` makes them.
        config: Of the model that they are for.
        path: File to write.

    Raises:
        ArtifactError: If GGUF files of the architecture have no such modules, or it is none of
            ``ARCHITECTURES``.
        MissingDependencyError: If the package gguf is not installed.
    """
    check_gguf(config)
    import gguf

    kind = ARCHITECTURES[config.model_type]
    [arch] = [number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind.name]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    [(alpha, _)] = Counter(pair.rank for pair in factors.values()).most_common(1)
    tensors: dict[str, Tensor] = {}
    for module, pair in factors.items():
        name = names.get_name(f"{module}.weight", (".weight",))
        if name is None:
            raise ArtifactError(
                f"A GGUF file of `{kind.name}` has no tensor for `{module}`, which the edit "
                "changes. Export the whole edited model instead (`hf`), and convert that."
            )
        b_OR = pair.b.detach().cpu().float() * (pair.rank / alpha)
        if kind.is_permuted:
            b_OR = _permuted(b_OR, module, config)
        tensors[f"{name}.lora_a"] = pair.a.detach().cpu().float()
        tensors[f"{name}.lora_b"] = b_OR
    writer = gguf.GGUFWriter(path, kind.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permuted(b_OR: Tensor, module: str, config: PretrainedConfig) -> Tensor:
    """Rows of queries and keys in the order of GGUF: within a head, i and i + half side by side."""
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(module.rpartition(".")[2])
    if heads is None:
        return b_OR
    rows_O = torch.arange(len(b_OR)).view(heads, 2, -1).transpose(1, 2).reshape(-1)
    return b_OR[rows_O]
