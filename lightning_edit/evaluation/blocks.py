# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What running a model's blocks by themselves takes, however its authors wrote them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["hidden_states", "scaled_logits", "with_cache"]


def hidden_states(output: Any) -> Tensor:
    """A block's hidden states: some blocks return a tuple around them."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def with_cache(
    args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with another cache of keys and values, in a new dict."""
    from transformers import Cache

    def swap(value: Any) -> Any:
        return cache if isinstance(value, Cache) else value

    return tuple(swap(a) for a in args), {name: swap(v) for name, v in kwargs.items()}


def scaled_logits(model: Any, logits: Tensor) -> Tensor:
    """What a model does to the output of its projection to the vocabulary, by its configuration.

    Args:
        model: A Hugging Face language model.
        logits: The projection's output, [..., V].

    Returns:
        Logits scaled and capped, [..., V] float32.
    """
    logits = logits.float()
    config = getattr(model, "config", None)
    for name, power in (("logit_scale", 1), ("logits_scaling", -1)):
        logits = logits * (getattr(config, name, None) or 1.0) ** power
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
