# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Safetensors files of tensors alone, with a checksum of all that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_edit.core import files
from lightning_edit.core.hashing import nested_hash
from lightning_edit.core.schema import check_header

__all__ = ["read_sealed", "tensors_in", "write_sealed"]

_VERSION = "2"
_SEAL = {"format_version", "sha256"}
# What files of version 0.1.0 say of themselves, always both.
_BEFORE = {"base", "base_sha256"}


def tensors_in(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which can be replaced while they are in use.

    safetensors maps files into memory, where the system lets a file be replaced that is mapped.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    return {n: t.clone() for n, t in tensors.items()} if files.LOCKS_OPEN_FILES else tensors


def write_sealed(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> Path:
    """Writes tensors, what is to be known of them, and a checksum of both.

    Args:
        file: Its folder is made if it is missing.
        tensors: Name to tensor.
        about: Name to text.

    Returns:
        The file.

    Examples:
        >>> import torch
        >>> file = write_sealed(getfixture("tmp_path") / "a", {"x": torch.ones(2)}, {"of": "b"})
        >>> read_sealed(file)
        ({'x': tensor([1., 1.])}, {'of': 'b'})
    """
    from safetensors.torch import save_file

    about = {**about, "format_version": _VERSION}
    sealed = {**about, "sha256": _hash(tensors, about)}
    with files.replacing(file) as part:
        save_file(dict(tensors), part, sealed)
    return file


def read_sealed(file: Path, *, is_needed: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what ``write_sealed`` wrote, or tensors that came from elsewhere.

    Args:
        file: A safetensors file.
        is_needed: Whether it has to have a checksum, which files of others and of version 0.1.0 do
            not have.

    Returns:
        Name to tensor, and what is known of them.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    check_header(file)
    try:
        with safe_open(file, "pt") as stream:
            about = dict(stream.metadata() or {})
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    tensors = tensors_in(file)
    digest = about.pop("sha256", None)
    if digest is None and "format_version" not in about and not is_needed:
        if len(_BEFORE & about.keys()) == 1:
            raise ValueError("what it says of its base is not whole")
        return tensors, about
    if digest != _hash(tensors, about):
        raise ValueError("it does not hold what was written, by its checksum")
    return tensors, {name: text for name, text in about.items() if name not in _SEAL}


def _hash(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    # In order of their names, which a file does not keep.
    return nested_hash([dict(sorted(tensors.items())), dict(sorted(about.items()))])
