# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters read as weight changes: (alpha/r) B A for each target, without the adapter."""

# Shapes: R rank, I inputs, O outputs of an adapted linear map.

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Required, TypedDict, cast

from torch import Tensor, nn

from lightning_edit.core.change import Change, LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.documents import parse_json, read_text
from lightning_edit.core.errors import ArtifactError, ModelError
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.core.sharding import whole_tensor
from lightning_edit.core.tensor_files import tensors_in
from lightning_edit.core.wrappers import plain_names

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

__all__ = ["adapter_changes", "has_adapter", "load_adapter"]

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
# Initializations that change the base weights themselves, which (alpha/r) B A leaves out.
_MOVES_BASE = ("corda", "lora_ga", "loftq", "olora", "pissa")
# Kinds of LoRA that compute something else.
_OTHER_KINDS = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config")


class _Config(TypedDict, total=False):
    """What is read of ``adapter_config.json``."""

    peft_type: Required[str]
    lora_alpha: Required[float]
    init_lora_weights: bool | str
    r: int
    alpha_pattern: dict[str, float] | None
    use_rslora: bool
    fan_in_fan_out: bool
    target_modules: list[str] | str | None
    base_model_name_or_path: str | None


def has_adapter(model: nn.Module) -> bool:
    """Whether LoRA layers have been put into the model."""
    return any(_is_adapted(module) for module in model.modules())


def adapter_changes(
    model: nn.Module, values: Mapping[str, Tensor] | None = None
) -> dict[str, Change]:
    """What the active adapters in a model add to its weights.

    Args:
        model: A model with LoRA layers of peft in it.
        values: Parameter name, as in ``model``, to the tensor to take instead of the current one:
            the adapter as it was before.

    Returns:
        Plain parameter name to the factors of (alpha/r) B A, in the parameter's storage layout.

    Raises:
        ModelError: If an adapter is of a kind whose change is not (alpha/r) B A.
    """
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **(values or {})}
    delta = WeightDelta({})
    for path, module in model.named_modules():
        if not _is_adapted(module):
            continue
        layer: LoraLayer = module
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A or adapter in getattr(layer, "lora_variant", {}):
                raise ModelError(
                    f"The adapter {adapter!r} of `{path}` is not plain LoRA on a linear map, so "
                    "its change is not (alpha/r) B A. Use plain LoRA (no DoRA, no embeddings)."
                )
            a_RI = whole_tensor(named[f"{path}.lora_A.{adapter}.weight"])
            b_OR = whole_tensor(named[f"{path}.lora_B.{adapter}.weight"])
            scale = float(layer.scaling[adapter])
            change = _factors(a_RI, b_OR, scale, _is_transposed(layer.base_layer))
            delta = delta + WeightDelta({f"{path}.weight": change})
    return delta.changes


def load_adapter(folder: str | Path, model: nn.Module) -> WeightDelta:
    """Reads a saved LoRA adapter as an edit; peft itself is not needed.

    Args:
        folder: What peft's ``save_pretrained`` wrote.
        model: The language model it is for, or one like it: says how its weights are stored.

    Raises:
        ArtifactError: If a file is missing or damaged, or the adapter's change is not
            (alpha/r) B A for weights of this model.

    References:
        LoRA, arXiv 2106.09685; rank-stabilized scaling alpha/√r, arXiv 2312.03732.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    weights = plain_names(model)
    modules = dict(model.named_modules())
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    changes: dict[str, Change] = {}
    for key, a_RI in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        target = key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        b_OR = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if b_OR is None or b_OR.shape[-1] != a_RI.shape[0]:
            raise ArtifactError(f"`{folder / TENSORS}` lacks the matrix B that goes with `{key}`.")
        if f"{target}.weight" not in weights:
            raise ArtifactError(
                f"The adapter in `{folder}` changes `{target}.weight`, which this model does not "
                f"have. It was trained for {config.get('base_model_name_or_path')!r}."
            )
        # peft matches a pattern as the end of the module's name.
        alpha = next(
            (value for name, value in alphas.items() if re.match(rf"(.*\.)?({name})$", target)),
            config["lora_alpha"],
        )
        rank = a_RI.shape[0]
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        module = modules[target]
        base = module.get_submodule("base_layer") if _is_adapted(module) else module
        changes[f"{target}.weight"] = _factors(
            a_RI, b_OR, scale, _is_transposed(base, bool(config.get("fan_in_fan_out")))
        )
    settings = {k: config.get(k) for k in ("r", "lora_alpha", "use_rslora", "target_modules")}
    base_info = BaseModelInfo(id=str(config.get("base_model_name_or_path") or ""))
    return WeightDelta(
        changes, Provenance("LoRA", "https://arxiv.org/abs/2106.09685", settings, base_info)
    )


def _read_config(folder: Path) -> _Config:
    try:
        config: _Config = cast(_Config, parse_json(read_text(folder / CONFIG)))
        kind, moves = config["peft_type"], str(config.get("init_lora_weights")).lower()
        _ = config["lora_alpha"] if kind == "LORA" else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"`{folder / CONFIG}` cannot be read ({error!r}). Name the folder that peft's "
            "`save_pretrained` wrote."
        ) from None
    wrong = None
    if kind != "LORA":
        wrong = f"a {kind} adapter"
    elif other := [name for name in _OTHER_KINDS if config.get(name)]:
        wrong = f"a variant of LoRA (`{other[0]}`)"
    elif moves.startswith(_MOVES_BASE):
        wrong = f"initialized by {moves}, which changes the base weights too"
    if wrong:
        raise ArtifactError(
            f"The adapter in `{folder}` is {wrong}; only plain LoRA changes weights by "
            "(alpha/r) B A. Train a plain LoRA adapter, or save the difference of the merged "
            "weights as a `WeightDelta`."
        )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        tensors = tensors_in(folder / TENSORS)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"`{folder / TENSORS}` cannot be read ({error}). Save the adapter again with peft's "
            "`save_pretrained`, as safetensors."
        ) from None
    foreign = [key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if foreign or not tensors:
        raise ArtifactError(
            f"`{folder / TENSORS}` holds {f'`{foreign[0]}`' if foreign else 'nothing'}, but only "
            "the matrices A and B of linear maps can be read. Train LoRA without biases, "
            "embeddings and `modules_to_save`."
        )
    return tensors


def _factors(a_RI: Tensor, b_OR: Tensor, scale: float, is_transposed: bool) -> LowRank:
    # A copy: training goes on with the adapter's own A.
    u, v = b_OR.detach().float() * scale, a_RI.detach().float().T.clone()
    return LowRank(v, u) if is_transposed else LowRank(u, v)


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict)


def _is_transposed(module: nn.Module, otherwise: bool = False) -> bool:
    """Whether a linear map is stored as [I, O], as transformers' Conv1D is."""
    if isinstance(module, nn.Linear):
        return False
    return True if isinstance(getattr(module, "nf", None), int) else otherwise
