# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A model with the weights that a quantised file of it would hold."""

# Shapes: O outputs and I inputs of a linear map.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lightning_edit.core.errors import MissingDependencyError, ModelError
from lightning_edit.core.linear_maps import linears
from lightning_edit.core.locator import ModelTree

__all__ = ["QuantFormat", "quantised", "rounded"]

#: Of weights alone: ``int8`` (a scale an output) and ``int4`` (one for 32 inputs) as torchao has
#: them, ``q8_0`` and ``q4_0`` (one for 32 inputs) as GGUF files do.
QuantFormat = Literal["int8", "int4", "q8_0", "q4_0"]

GROUP = 32  # inputs that share a scale


def rounded(weight: Tensor, form: QuantFormat) -> Tensor:
    """The matrix that is read back where one is stored in a quantised format.

    Args:
        weight: [O, I].
        form: The format.

    Returns:
        [O, I], in the number format and on the device of the matrix.

    Raises:
        MissingDependencyError: If the format's package is not installed.
        ModelError: If the format does not divide rows of that length.

    Examples:
        >>> weight = torch.linspace(-1, 1, 64).reshape(2, 32)
        >>> float((rounded(weight, "q4_0") - weight).abs().max()) < 0.1
        True
    """
    if form != "int8" and weight.shape[1] % GROUP:
        raise ModelError(
            f"`{form}` shares a scale among {GROUP} inputs, which do not divide the "
            f"{weight.shape[1]} of a projection of this model. Choose `int8`."
        )
    plain = weight.detach().float().cpu()
    read = _by_gguf(plain, form) if form.startswith("q") else _by_torchao(plain, form)
    return read.to(weight)


def _by_torchao(weight: Tensor, form: QuantFormat) -> Tensor:
    try:
        from torchao.quantization import (
            Int8WeightOnlyConfig,
            IntxWeightOnlyConfig,
            PerGroup,
            quantize_,
        )
    except ImportError:
        raise MissingDependencyError("torchao", "quantise", f"`{form}`") from None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    kind = torch.int4  # type: ignore[attr-defined]
    four_bits = IntxWeightOnlyConfig(kind, PerGroup(GROUP))
    quantize_(layer, Int8WeightOnlyConfig() if form == "int8" else four_bits)
    return layer.weight.dequantize()


def _by_gguf(weight: Tensor, form: QuantFormat) -> Tensor:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quantize
    except ImportError:
        raise MissingDependencyError("gguf", "default-model", f"`{form}`") from None
    kind = GGMLQuantizationType[form.upper()]
    return torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind))


@contextmanager
def quantised(model: nn.Module, form: QuantFormat) -> Iterator[None]:
    """Context manager: the linear maps of a model's blocks are what a quantised file gives back.

    Embeddings, norms, biases and the projection to the vocabulary stay as they are, and so does a
    memory. Products are those of the model's own number format, without the rounding of activations
    that some kernels add. All weights are put back after it, bit for bit.

    Args:
        model: A language model.
        form: The format.

    Raises:
        MissingDependencyError: If the format's package is not installed.
        ModelError: If the format does not divide rows of the model's lengths.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> model = tiny_model()
        >>> weight = model.model.layers[0].mlp.up_proj.weight
        >>> before = weight.detach().clone()
        >>> with quantised(model, "q8_0"):
        ...     torch.equal(weight, before)
        False
        >>> torch.equal(weight, before)
        True
    """
    maps = [one for block in ModelTree.of(model).blocks for _, one in linears(block)]
    weights = {cast(Tensor, one.weight): isinstance(one, nn.Linear) for one in maps}
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for weight, is_rows in weights.items():
                read = rounded(weight if is_rows else weight.T, form)
                kept.append((weight, weight.detach().clone()))
                weight.copy_(read if is_rows else read.T)
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)
