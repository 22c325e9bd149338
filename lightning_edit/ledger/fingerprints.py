# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of a model as it stands: weights, adapters, and what its memory holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import nn

from lightning_edit.core.hashing import tensor_hash, weight_hash
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.side_memory import EditMemory, MemoryEntry
from lightning_edit.core.wrappers import plain_names, unwrapped

__all__ = ["entries_before", "fingerprint"]


def fingerprint(
    model: nn.Module,
    weights: str | None = None,
    entries: Mapping[str, MemoryEntry] | None = None,
) -> str:
    """SHA-256 over all that makes a model say what it says, in hexadecimal.

    Of a model without adapter and memory it is the hash of its weights.

    Args:
        model: Any model, or what wraps one.
        weights: Hash of its weights, where it is known already.
        entries: What counts in the place of the entries of its memory.

    Examples:
        >>> from lightning_edit.core.hashing import weight_hash
        >>> layer = nn.Linear(2, 2)
        >>> fingerprint(layer) == weight_hash(layer)
        True
    """
    model = unwrapped(model)
    found = weight_hash(model) if weights is None else weights
    own = set(plain_names(model).values())
    more = {name: p for name, p in model.named_parameters() if name not in own}
    parts = [f"{name} {tensor_hash(p)}" for name, p in sorted(more.items())]
    memory = EditMemory.find(model)
    if memory is not None:
        held = memory.entries if entries is None else entries
        parts += _memory(memory, held) if held else []
    return hashlib.sha256("\n".join([found, *parts]).encode()).hexdigest() if parts else found


def entries_before(edit: MemoryWrite, model: nn.Module) -> dict[str, MemoryEntry]:
    """What a memory held before an edit that stands in it.

    Args:
        edit: The edit, which knows what it replaced.
        model: The model with the memory.
    """
    memory = EditMemory.find(unwrapped(model))
    now = {} if memory is None else memory.entries
    back = {**now, **edit.replaced}
    order = dict.fromkeys((*edit.order, *now, *edit.replaced))
    return {name: e for name in order if (e := back.get(name)) is not None}


def _memory(memory: EditMemory, entries: Mapping[str, MemoryEntry]) -> list[str]:
    about: list[object] = [type(memory).__name__, memory.settings]
    about += [[name, dict(e.requests), dict(e.notes)] for name, e in entries.items()]
    tensors = {f"shared.{name}": tensor for name, tensor in memory.shared().items()}
    for i, entry in enumerate(entries.values()):
        tensors |= {f"{i}.{name}": tensor for name, tensor in entry.tensors.items()}
    lines = [f"{name} {tensor_hash(tensor)}" for name, tensor in sorted(tensors.items())]
    return [json.dumps(about, sort_keys=True), *lines]
