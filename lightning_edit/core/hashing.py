# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Hashes by which an edit recognizes the weights it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_edit.core.processes import Processes
from lightning_edit.core.sharding import local_shard, whole_tensor
from lightning_edit.core.wrappers import plain_parameters

__all__ = ["WeightHashes", "is_sharded", "nested_hash", "quick_hash", "tensor_hash", "weight_hash"]

_PIECE = 2**26  # bytes that are hashed at a time


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
    whole = (full_tensor() if full_tensor else tensor).detach().contiguous()
    digest = hashlib.sha256(f"{whole.dtype}{list(whole.shape)}".encode())
    # Piece by piece, so that of a tensor on another device no whole copy is made.
    for piece in whole.reshape(-1).view(torch.uint8).split(_PIECE):
        digest.update(piece.cpu().numpy().data)
    return digest.hexdigest()


def weight_hash(model: nn.Module, originals: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 over the names and hashes of all parameters, in hexadecimal.

    Names are those of the plain model, whatever wraps it; an adapter in it does not count. Tied
    parameters count once. Buffers do not count: those of language models (masks, rotary
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
    return _combined(_hashes({**plain_parameters(model), **(originals or {})}))


def quick_hash(tensor: Tensor) -> tuple[object, ...]:
    """Fingerprint of this process's part of a tensor, by sums over its bits.

    It takes two passes at the speed of the memory, and tells what something else wrote from what
    stood there; it is no protection against somebody who wants two tensors to have the same.

    Args:
        tensor: Any dtype, device and shape.

    Examples:
        >>> import torch
        >>> quick_hash(torch.tensor([1.0, 2.0])) == quick_hash(torch.tensor([1.0, 2.0]))
        True
        >>> quick_hash(torch.tensor([1.0, 2.0])) == quick_hash(torch.tensor([2.0, 1.0]))
        False
    """
    part = local_shard(tensor)
    data = part.contiguous().reshape(-1).view(torch.uint8)
    data = data.clone() if data.storage_offset() % 8 else data  # which a view as int64 asks for
    whole = len(data) // 8 * 8
    bits = data[:whole].view(torch.int64)  # summed at once, where smaller ones are converted first
    width = 512
    square = len(bits) // width * width
    blocks = bits[:square].view(-1, width)
    sums = [blocks.sum(0), blocks.sum(1), bits[square:], data[whole:].long()]
    # Weighted by place, so that a permutation has another sum.
    weighted = [(s * torch.arange(1, 2 * len(s) + 1, 2, device=s.device)).sum() for s in sums]
    return part.dtype, tuple(part.shape), *torch.stack(weighted).tolist()


def nested_hash(value: object) -> str:
    """SHA-256 over what a checkpoint holds: mappings and lists of tensors and primitives.

    Of anything else, of which a checkpoint without pickles holds nothing, the type alone counts.

    Args:
        value: However deep; tensors on any device, none of them sharded.

    Examples:
        >>> nested_hash({"a": [1, True]}) == nested_hash({"a": [1, True]})
        True
        >>> nested_hash({"a": [1, True]}) == nested_hash({"a": [1, 1]})
        False
    """
    parts = list(_parts(value))
    found = _hashes({str(i): part for i, part in enumerate(parts) if isinstance(part, Tensor)})
    lines = [found.get(str(i), part) for i, part in enumerate(parts)]
    text = "\n".join(map(str, lines))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def is_sharded(value: object) -> bool:
    """Whether a nested value holds tensors of which this process has but a part."""
    return any(hasattr(part, "full_tensor") for part in _parts(value))


def _parts(value: object) -> Iterator[str | Tensor]:
    """What a nested value consists of, in order: its tensors, and a line for all else."""
    pending: list[tuple[str, object]] = [("", value)]
    while pending:
        key, one = pending.pop()
        if isinstance(one, Tensor) and one.layout == torch.strided:
            yield f"{key} tensor"
            yield one.detach()
        elif isinstance(one, Mapping):
            yield f"{key} mapping {len(one)}"
            inner = ((_key(name), item) for name, item in one.items())
            pending += reversed(list(inner))
        elif isinstance(one, (list, tuple)):
            yield f"{key} list {len(one)}"
            pending += (("", item) for item in reversed(one))
        elif isinstance(one, str):
            yield f"{key} text {str.__str__(one)!r}"  # of an enumeration, too
        elif one is None or isinstance(one, (bool, int, float, bytes)):
            yield f"{key} {type(one).__name__} {one!r}"
        else:
            yield f"{key} {type(one).__name__}"


def _key(name: object) -> str:
    if isinstance(name, str):
        return f"text {str.__str__(name)!r}"
    return f"{type(name).__name__} {name!r}"


class WeightHashes:
    """Hashes of a model's weights, computed anew only for those that were written since.

    A write is known by the tensor's version, which every operation in place raises.

    Args:
        model: Any module.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> hashes = WeightHashes(layer)
        >>> hashes.combined() == weight_hash(layer)
        True
        >>> _ = torch.nn.init.zeros_(layer.bias)
        >>> hashes.combined() == weight_hash(layer)
        True
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[str, tuple[tuple[int, int], str]] = {}

    def combined(self, originals: Mapping[str, Tensor] | None = None) -> str:
        """The model's ``weight_hash``, with ``originals`` in the place of its own parameters."""
        instead = originals or {}
        named = {n: p for n, p in plain_parameters(self._model).items() if n not in instead}
        states = _states(named)
        known = {name: state for name, (state, _) in self._known.items()}
        changed = {name: p for name, p in named.items() if known.get(name) != states[name]}
        self._known |= {name: (states[name], found) for name, found in _hashes(changed).items()}
        return _combined({**{name: self._known[name][1] for name in named}, **_hashes(instead)})

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Context manager: what is written in it is put back bit for bit, so that hashes hold.

        After an error in it, what was written is hashed anew.
        """
        before = _states(plain_parameters(self._model))
        held = {n: found for n, (state, found) in self._known.items() if before.get(n) == state}
        yield
        after = _states(plain_parameters(self._model))
        self._known |= {n: (after[n], found) for n, found in held.items() if n in after}


def _states(named: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Where each tensor lies, and its version."""
    parts = {name: local_shard(tensor) for name, tensor in named.items()}
    return {name: (part.data_ptr(), part._version) for name, part in parts.items()}


def _hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    if any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):
        # Gathering is collective: every rank must do it in the same order, so not in threads.
        one, own = Processes.running(), dict[str, str]()
        for i, (name, tensor) in enumerate(tensors.items()):
            whole = whole_tensor(tensor)
            if i % one.count == one.rank:
                own[name] = tensor_hash(whole)
        return {name: found for part in one.objects(own) for name, found in part.items()}
    # hashlib releases the interpreter lock on large inputs, so threads help.
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(tensors, pool.map(tensor_hash, tensors.values()), strict=True))


def _combined(hashes: Mapping[str, str]) -> str:
    lines = sorted(f"{name} {digest}" for name, digest in hashes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
