# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Hashes by which an edit recognizes the weights it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

__all__ = ["tensor_hash", "weight_hash"]


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 over a tensor's dtype, shape and bytes, in hexadecimal.

    Args:
        tensor: Any dtype, device and shape.

    Examples:
        >>> import torch
        >>> tensor_hash(torch.zeros(2)) == tensor_hash(torch.zeros(2).view(2))
        True
        >>> tensor_hash(torch.zeros(2)) == tensor_hash(torch.zeros(2, dtype=torch.bfloat16))
        False
    """
    full_tensor = getattr(tensor, "full_tensor", None)
    whole = (full_tensor() if full_tensor else tensor).detach().cpu().contiguous()
    digest = hashlib.sha256(f"{whole.dtype}{list(whole.shape)}".encode())
    digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weight_hash(model: nn.Module, originals: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 over the names and hashes of all parameters, in hexadecimal.

    Tied parameters count once. Buffers do not count: those of language models (masks, rotary
    frequencies) follow from the configuration.

    Args:
        model: Any module.
        originals: Parameter name to the tensor that counts in its place: the hash of an edited
            model's base.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = weight_hash(layer)
        >>> _ = torch.nn.init.zeros_(layer.bias)
        >>> weight_hash(layer) == before
        False
    """
    named = list({**dict(model.named_parameters()), **(originals or {})}.items())
    tensors = [tensor for _, tensor in named]
    if any(hasattr(tensor, "full_tensor") for tensor in tensors):
        # Gathering is collective: every rank must do it in the same order, so not in threads.
        hashes = [tensor_hash(tensor) for tensor in tensors]
    else:
        # hashlib releases the interpreter lock on large inputs, so threads help.
        with ThreadPoolExecutor(max_workers=4) as pool:
            hashes = list(pool.map(tensor_hash, tensors))
    lines = sorted(f"{name} {digest}" for (name, _), digest in zip(named, hashes, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
