# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The cards of edited models and of adapters, for whoever finds the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

from lightning_edit.core.edit import Edit
from lightning_edit.core.lora import LoRAFactors
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.provenance import Provenance
from lightning_edit.models import DEFAULT_MODEL, MEMORY_FOLDER
from lightning_edit.rendering.card import make_card

__all__ = ["adapter_card", "model_card"]


def model_card(edit: Edit, memory: MemoryWrite | None = None, earlier: Sequence[Edit] = ()) -> str:
    """The card of an edited model: what was changed, how it is loaded, and how to undo it.

    Args:
        edit: The edit.
        memory: What the model's memory holds, which lies in a folder of its own.
        earlier: Edits of weights that were in the model before, in order.
    """
    norm = edit.norm() if edit.changes_weights and not earlier else None
    kind = type(edit).__name__
    made = [one.provenance for one in (*earlier, edit)]
    method = " and ".join(dict.fromkeys(one.method for one in made if one.method))
    provenance = replace(reduce(Provenance.and_then, made), method=method)
    if memory is None:
        return _card("edited_model", provenance, library="transformers", kind=kind, norm=norm)
    held = {"kind": memory.kind, "folder": MEMORY_FOLDER, "entries": len(memory)}
    return _card(
        "edited_model",
        provenance,
        library="lightning_edit",
        kind=kind,
        norm=norm,
        memory=held,
    )


def adapter_card(
    factors: Mapping[str, LoRAFactors], provenance: Provenance, is_encoder_decoder: bool
) -> str:
    """The card of an adapter: how peft loads it, and what it leaves out of the edit.

    Args:
        factors: Module name to factors.
        provenance: Of the edit.
        is_encoder_decoder: Which kind of model it is for.
    """
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
    return _card(
        "adapter",
        provenance,
        library="peft",
        tags=["lora"],
        factors=factors,
        code="\n".join(code),
    )


def _card(
    template: str,
    provenance: Provenance,
    *,
    library: str,
    tags: Sequence[str] = (),
    **values: object,
) -> str:
    return make_card(
        template,
        library=library,
        tags=tags,
        method=provenance.method,
        base=provenance.base.id,
        paper=provenance.paper,
        request_ids=provenance.request_ids,
        requests=provenance.requests,
        sha256=provenance.base.sha256,
        **values,
    )
