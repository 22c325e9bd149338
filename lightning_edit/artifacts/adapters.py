# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in the format of peft, and the module trees that they are made for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_edit.artifacts.cards import adapter_card
from lightning_edit.artifacts.folders import check_ours, list_files
from lightning_edit.core.errors import ArtifactError, ModelError
from lightning_edit.core.files import atomic_folder
from lightning_edit.core.lora import LoRAFactors
from lightning_edit.core.provenance import Provenance
from lightning_edit.core.storage import CARD
from lightning_edit.models import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["model_skeleton", "save_adapter"]


def model_skeleton(model: str, revision: str | None = None) -> PreTrainedModel:
    """A model's module tree without weights, on the meta device.

    Args:
        model: As in [`load_model`][lightning_edit.load_model].
        revision: Of a hub id.

    Raises:
        ModelError: If there is no such model.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> folder = getfixture("tmp_path")
        >>> tiny_model("gpt2").config.save_pretrained(folder)
        >>> model_skeleton(str(folder)).transformer.h[0].mlp.c_proj.weight.device
        device(type='meta')
    """
    import transformers

    name = resolve_model(model)
    try:
        config = transformers.AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"The configuration of `{model}`, which says how its weights are stored, cannot be "
            f"read: {' '.join(str(error).split())}"
        ) from error
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    with torch.device("meta"):
        return auto.from_config(config)


def save_adapter(
    factors: Mapping[str, LoRAFactors],
    folder: Path,
    *,
    provenance: Provenance,
    is_encoder_decoder: bool = False,
) -> None:
    """Writes LoRA factors as a folder that ``peft.PeftModel.from_pretrained`` reads.

    Each module has its own rank, and alpha equal to it, so that nothing is scaled. Modules are
    named in full, so that no other is adapted.

    Args:
        factors: Module name to factors, as ``core.lora.to_lora`` makes them.
        folder: Replaced if it holds a model or an adapter that was written here.
        provenance: Of the edit.
        is_encoder_decoder: Which kind of model it is for.

    Raises:
        ArtifactError: If there are no factors, or the folder holds anything else.
    """
    from safetensors.torch import save_file

    if not factors:
        raise ArtifactError("The edit changes nothing, so that there is nothing to export.")
    ranks = {name: pair.rank for name, pair in factors.items()}
    [(usual, _)] = Counter(ranks.values()).most_common(1)
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    base = provenance.base
    config: dict[str, object] = {
        "alpha_pattern": others,
        "base_model_name_or_path": base.id or None,
        "bias": "none",
        "fan_in_fan_out": any(pair.transposed for pair in factors.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": others,
        "revision": base.revision,
        "target_modules": sorted(factors),
        "task_type": "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {}
    for name, pair in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.a.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.b.detach().cpu().contiguous()
    with atomic_folder(folder, check_ours) as staging:
        save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=2) + "\n"
        (staging / "adapter_config.json").write_text(text, encoding="utf-8")
        card = adapter_card(factors, provenance, is_encoder_decoder)
        (staging / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")
        list_files(staging)
