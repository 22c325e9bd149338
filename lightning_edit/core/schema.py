# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What the files of a saved edit may hold: checked before anything is made of them."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, cast

import torch
from torch import Tensor

# Of the standard library, pydantic takes it from Python 3.12 on.
from typing_extensions import TypedDict

from lightning_edit.core.documents import parse_json

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "DTYPES",
    "Description",
    "check_description",
    "check_factors",
    "check_header",
    "version_of",
]

# Number formats that tensors of an edit may have: those that can be computed with.
_FORMATS = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
#: Those of changes and originals.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Twice the largest matrix of a model of 405 billion parameters.
_MAX_ELEMENTS = 2**31
# Of a safetensors file, the length of its header in bytes.
_LENGTH = 8
_MAX_HEADER = 100_000_000  # that of the safetensors library


class _Parameter(TypedDict):
    shape: list[int]
    rank: NotRequired[int | None]
    original_sha256: NotRequired[str]
    edited_sha256: NotRequired[str]


class _Entry(TypedDict):
    id: str
    requests: NotRequired[dict[str, dict[str, object]]]
    notes: NotRequired[dict[str, object]]


class _Memory(TypedDict):
    kind: str
    settings: dict[str, object]


class _Base(TypedDict):
    id: NotRequired[str]
    revision: NotRequired[str | None]
    dtype: NotRequired[str]
    sha256: NotRequired[str]
    parameters: NotRequired[int]


class Description(TypedDict):
    """The description of a saved edit, ``delta_config.json``, as JSON types."""

    format_version: int
    parameters: dict[str, _Parameter]
    kind: NotRequired[str]
    method: NotRequired[str]
    paper: NotRequired[str]
    settings: NotRequired[dict[str, object]]
    base: NotRequired[_Base]
    request_ids: NotRequired[list[str]]
    requests: NotRequired[list[dict[str, object]]]
    created: NotRequired[str]
    norm: NotRequired[float]
    memory: NotRequired[_Memory]
    entries: NotRequired[list[_Entry]]
    replaced: NotRequired[list[_Entry]]
    order: NotRequired[list[str]]
    tensors_sha256: NotRequired[str]
    sha256: NotRequired[str]


def version_of(found: object) -> int:
    """The format of a description.

    Raises:
        ValueError: If it has none.
    """
    version = found.get("format_version") if isinstance(found, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(f"its `format_version` is {version!r}, not a number from 1 on")
    return version


def check_description(found: object) -> Description:
    """A description of an edit, as it was read, if each of its parts has the type that it must.

    Args:
        found: What was read.

    Raises:
        ValueError: If a part is missing or of another type; the message names it.
    """
    from pydantic import ValidationError

    try:
        _adapter().validate_python(found, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"`{name}`: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return cast(Description, found)  # with what later versions may have added


def check_header(path: Path) -> None:
    """Checks what a safetensors file says of its tensors, before memory is taken for them.

    Args:
        path: The file.

    Raises:
        ValueError: If the header is longer than the file, or a tensor has a number format that
            cannot be computed with. That all sizes add up to the file's, safetensors checks.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if not 2 <= length <= min(size - _LENGTH, _MAX_HEADER):
            raise ValueError(f"its header is said to have {length} bytes, the file has {size}")
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    for name, about in header.items():
        kind = about.get("dtype") if isinstance(about, dict) else None
        if name != "__metadata__" and kind not in _FORMATS:
            raise ValueError(f"`{name}` has the number format {kind}, which no edit has")


def check_factors(name: str, u: Tensor, v: Tensor, rank: int | None) -> None:
    """Checks that two tensors are factors of a change.

    Args:
        name: Name of the parameter.
        u: To have the shape [rows, rank]; of a stack of E matrices [E, rows, rank], or 1 for E.
        v: To have the shape [columns, rank]; of a stack [E, columns, rank], or 1 for E.
        rank: As the description has it.

    Raises:
        ValueError: If they are not, or their product would take more memory than any weight.
    """
    shapes = f"{list(u.shape)} and {list(v.shape)}"
    is_pair = u.ndim == v.ndim in (2, 3) and u.shape[-1] == v.shape[-1] > 0
    if not is_pair or (u.ndim == 3 and 1 not in (len(u), len(v))):
        raise ValueError(f"the factors of `{name}` have the shapes {shapes}")
    if rank is not None and rank != u.shape[-1]:
        raise ValueError(f"`{name}` is to have the rank {rank}, but its factors are {shapes}")
    if math.prod(u.shape[:-1]) * math.prod(v.shape[:-1]) > _MAX_ELEMENTS:
        raise ValueError(f"the factors of `{name}`, {shapes}, are of no weight of this size")


@cache
def _adapter() -> TypeAdapter[Description]:
    from pydantic import TypeAdapter

    return TypeAdapter(Description)
