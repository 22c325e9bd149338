# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Attention of many short rows, for which the usual kernels waste most of their time."""

# Shapes: N rows, G groups of heads that share keys and values, Q queries of a group, D width of a
# head.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

__all__ = ["aligned_mask", "quick_attention", "short_attention"]

ALIGNED = 8  # elements to whose multiples kernels of GPUs want rows of a mask to start


def aligned_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in the form that kernels of GPUs read, which they would else make in every block.

    Args:
        mask: What may be seen (bool), or what is added to scores, [..., positions].
        dtype: Of the queries.

    Returns:
        What is added to scores, in the shape of the mask.

    Examples:
        >>> aligned_mask(torch.tensor([[True, False], [True, True]]), torch.float32)
        tensor([[0., -inf],
                [0., 0.]])
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, -torch.inf
        )
    width = mask.shape[-1]
    return pad(mask.to(dtype), (0, -width % ALIGNED))[..., :width]


def quick_attention(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Context manager: attention by kernels that start at once, whatever the shapes.

    On processors, attention in half precision is plain matrix products, since the fused kernel
    starts a product for each head of each row. On GPUs cuDNN would plan anew for each shape, and
    rows of edits have many.

    Args:
        device: Where the model is.
        dtype: Precision in which attention runs.
    """
    if device.type == "cuda":
        usual = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return sdpa_kernel(usual)
    if device.type == "cpu" and dtype != torch.float32:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


@contextmanager
def short_attention(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Context manager: models with PyTorch's attention read short rows fast.

    The queries of heads that share a key are taken as further queries of one head, where the model
    would copy the key for each of them. Kernels are those of ``quick_attention``.

    Args:
        device: Where the model is.
        dtype: Precision in which attention runs.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    masks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # of all blocks, made once

    def mask_of(mask: Tensor, share: int, query: Tensor) -> Tensor:
        known = masks.get((id(mask), share))
        if known is None:
            # The mask is kept, too, so that no other one gets its id.
            made = mask.repeat(1, 1, share, 1)
            made = aligned_mask(made, query.dtype) if device.type == "cuda" else made
            known = masks[id(mask), share] = mask, made
        return known[1]

    def grouped(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        rows, heads, count, _ = query.shape
        groups, mask = key.shape[1], attention_mask
        plain = mask is not None and mask.shape[1] == 1 and kwargs.get("position_bias") is None
        if mask is None or not plain or heads == groups or dropout:
            return usual(
                module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs
            )
        share = heads // groups
        query_NGQD = query.reshape(rows, groups, share * count, -1)
        output_NGQD = scaled_dot_product_attention(
            query_NGQD, key, value, attn_mask=mask_of(mask, share, query), scale=scaling
        )
        output = output_NGQD.reshape(rows, heads, count, -1).transpose(1, 2).contiguous()
        return output, None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = grouped
    try:
        with quick_attention(device, dtype):
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not usual:  # it was an override itself
            ALL_ATTENTION_FUNCTIONS["sdpa"] = usual
