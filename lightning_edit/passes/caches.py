# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a model hands on from position to position, and whether rows can go on from a part of it."""

from __future__ import annotations

import inspect
import weakref

from torch import nn

__all__ = ["keeps_keys_and_values", "takes"]

_PLAIN: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def keeps_keys_and_values(model: nn.Module) -> bool:
    """Whether all that a model hands on is keys and values, a pair for each position it has read.

    Those can be cut, joined and padded. The state of linear attention, of a state space or of a
    convolution cannot: then whole rows are read again.

    Args:
        model: A Hugging Face language model; of one whose class or configuration does not say, yes.
    """
    if model not in _PLAIN:
        _PLAIN[model] = _is_plain(model)
    return _PLAIN[model]


def _is_plain(model: nn.Module) -> bool:
    from transformers import DynamicCache, PreTrainedConfig
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return True
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    return takes(model, "cache") and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def takes(model: nn.Module, name: str) -> bool:
    """Whether a model's ``forward`` names an argument."""
    return name in inspect.signature(model.forward).parameters
