# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Folders for other programs: Hugging Face models, and LoRA adapters in the format of peft."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_edit.core.errors import ArtifactError, ModelError
from lightning_edit.core.lora import LoRAFactors
from lightning_edit.core.provenance import Provenance
from lightning_edit.core.storage import CARD, atomic_folder, foreign_entries
from lightning_edit.models import DEFAULT_MODEL, resolve_model
from lightning_edit.rendering.card import make_card

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_output", "model_card", "model_skeleton", "save_adapter", "save_model"]

#: Lists the files of a folder that was written here, which alone may be replaced.
MANIFEST = "lightning_edit.json"

# What a model or an adapter consists of, by which a folder without such a list is known.
_WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors")
_FILES = re.compile(
    r"(adapter_|generation_|tokenizer_)?config\.json|model\.safetensors\.index\.json|README\.md"
    r"|tokenizer\.(json|model)|spiece\.model|sentencepiece\.bpe\.model|chat_template\.jinja"
    r"|(added_tokens|special_tokens_map|vocab)\.json|vocab\.txt|merges\.txt"
)


def check_output(output: str | Path, *, force: bool, inputs: tuple[str | Path, ...] = ()) -> Path:
    """Checks that a folder may be written, before the work that fills it.

    Args:
        output: The folder.
        force: Whether a model or adapter that was written there may be replaced.
        inputs: Folders that are read, and so must not be replaced.

    Raises:
        ArtifactError: If the folder is not empty and ``force`` is not given, or holds one of the
            inputs, or anything else than a model or an adapter written here.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"`{folder}` is a file. Give a folder as `output`.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder
    if not force:
        raise ArtifactError(
            f"The folder `{folder}` is not empty. Give another `output`, or `force` to replace "
            "the model in it."
        )
    for path in map(Path, inputs):
        if path.exists() and path.resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(
                f"`{folder}` cannot be replaced: `{path}` in it is needed. Give another `output`."
            )
    _check_ours(folder)
    return folder


def _check_ours(folder: Path) -> None:
    """Refuses to replace a folder that holds anything but a model or an adapter of ours."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    ours = _listed(folder) or {
        name
        for path in folder.iterdir()
        if _FILES.fullmatch(name := path.name) or _WEIGHTS.fullmatch(name)
    }
    has_config = not ours.isdisjoint(("config.json", "adapter_config.json"))
    if not has_config or not any(map(_WEIGHTS.fullmatch, ours)):
        raise ArtifactError(
            f"`{folder}` holds neither a model nor an adapter, so `force` does not replace it. "
            "Give another `output`, or empty the folder yourself."
        )
    foreign = foreign_entries(folder, ours)
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise ArtifactError(
            f"`{folder}` holds what is not of a model or an adapter written here, and replacing "
            f"the folder would delete it: {', '.join(foreign[:5])}{more}. Give another `output`, "
            "or move that elsewhere."
        )


def _listed(folder: Path) -> set[str]:
    """The files that were written here; none if there is no list of them."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {MANIFEST, *map(str, listed)} if isinstance(listed, list) else set()


def _list_files(folder: Path) -> None:
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    text = json.dumps({"format_version": 1, "files": sorted(files)}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def save_model(
    model: PreTrainedModel,
    folder: Path,
    *,
    source: str,
    revision: str | None = None,
    card: str = "",
) -> bool:
    """Writes a model and its tokenizer as transformers reads them, whole or not at all.

    Args:
        model: The model.
        folder: Replaced if it holds a model or an adapter that was written here.
        source: Folder or hub id that the tokenizer is copied from.
        revision: Of a hub id.
        card: Text of ``README.md``, as `model_card` makes it; none is written when empty.

    Returns:
        Whether there was a tokenizer to copy.

    Raises:
        ArtifactError: If the folder holds anything else.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            resolve_model(source), revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError):
        tokenizer = None
    with atomic_folder(folder, _check_ours) as staging, _no_progress_bar():
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if card:
            (staging / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")
        _list_files(staging)
    return tokenizer is not None


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


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
    config: dict[str, Any] = {
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
    with atomic_folder(folder, _check_ours) as staging:
        save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=2) + "\n"
        (staging / "adapter_config.json").write_text(text, encoding="utf-8")
        card = _adapter_card(factors, provenance, is_encoder_decoder)
        (staging / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")
        _list_files(staging)


def model_card(provenance: Provenance, norm: float) -> str:
    """The card of an edited model: what was changed, and how to undo it.

    Args:
        provenance: Of the edit.
        norm: ‖Δ‖ (Frobenius).
    """
    return _card("edited_model", provenance, library="transformers", norm=norm)


def _adapter_card(
    factors: Mapping[str, LoRAFactors], provenance: Provenance, is_encoder_decoder: bool
) -> str:
    base = provenance.base.id or "path/to/the/base/model"
    auto = "AutoModelForSeq2SeqLM" if is_encoder_decoder else "AutoModelForCausalLM"
    imports, load = f"from transformers import {auto}", f"{auto}.from_pretrained"
    if base == DEFAULT_MODEL:
        imports, load = "from lightning_edit.models import load_model", "load_model"
    code = [
        "from peft import PeftModel",
        imports,
        "",
        f"model = {load}({json.dumps(base)})",
        'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
    ]
    values = {"tags": ["lora"], "factors": factors, "code": "\n".join(code)}
    return _card("adapter", provenance, library="peft", **values)


def _card(template: str, provenance: Provenance, **values: Any) -> str:
    return make_card(
        template,
        method=provenance.method,
        base=provenance.base.id,
        paper=provenance.paper,
        request_ids=provenance.request_ids,
        sha256=provenance.base.sha256,
        **values,
    )
