# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Attention of many short rows, for which the usual kernels waste most of their time."""

# Shapes: N rows, G groups of heads that share keys and values, Q queries of a group, D width of a
# head.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["short_attention"]


@contextmanager
def short_attention(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Context manager: models with PyTorch's attention read short rows fast.

    The queries of heads that share a key are taken as further queries of one head, where the model
    would copy the key for each of them. On processors, attention in half precision is plain matrix
    products, since the fused kernel starts a product for each head of each row.

    Args:
        device: Where the model is.
        dtype: Precision in which attention runs.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    half = device.type == "cpu" and dtype != torch.float32

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
            query_NGQD, key, value, attn_mask=mask.repeat(1, 1, share, 1), scale=scaling
        )
        output = output_NGQD.reshape(rows, heads, count, -1).transpose(1, 2).contiguous()
        return output, None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = grouped
    try:
        with sdpa_kernel(SDPBackend.MATH) if half else nullcontext():
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not usual:  # it was an override itself
            ALL_ATTENTION_FUNCTIONS["sdpa"] = usual
