# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What running a model's blocks by themselves takes, however its authors wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_edit.core.errors import ModelError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.processes import tells_of_loss

if TYPE_CHECKING:
    from transformers import Cache

__all__ = [
    "Prefix",
    "explained",
    "rounding_limit",
    "running",
    "scaled_logits",
    "vocabulary_projection",
    "with_cache",
]

# Largest relative difference of logits that rounding accounts for: in float32, and in what has
# fewer digits.
FINE, COARSE = 1e-2, 1e-1
PROBE = 64  # rows of a product that shows how it is rounded: smaller ones may be made otherwise


class Prefix:
    """Keys and values of the positions before, to be read by attention and never added to.

    Args:
        layers: Index of a layer to its keys and values, [N, heads, positions, width of a head].
            Where attention has several times as many rows, each of these N goes to every set.
    """

    is_compileable = False

    def __init__(self, layers: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        self.layers = dict(layers)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """The prefix's keys and values and then the new ones."""
        if layer_idx not in self.layers:
            return key, value
        keys, values = self.layers[layer_idx]
        sets = key.shape[0] // keys.shape[0]
        if sets > 1:
            keys, values = (part.repeat(sets, 1, 1, 1) for part in (keys, values))
        return torch.cat([keys, key], dim=-2), torch.cat([values, value], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions in the prefix."""
        return self.layers[layer_idx][0].shape[-2] if layer_idx in self.layers else 0

    def select(self, rows: Tensor) -> Prefix:
        """The prefixes of some of the rows."""
        return Prefix({i: (k[rows], v[rows]) for i, (k, v) in self.layers.items()})


def rounding_limit(dtype: torch.dtype, device: torch.device) -> float:
    """Largest relative difference of logits that rounding accounts for.

    Products of float32 may have fewer digits than that: by ``torch.set_float32_matmul_precision``
    or a backend's own setting, or under autocast. So one is made, and looked at.

    Args:
        dtype: Of the states.
        device: Where they are.

    >>> rounding_limit(torch.float32, torch.device("cpu"))
    0.01
    >>> rounding_limit(torch.bfloat16, torch.device("cpu"))
    0.1
    """
    if dtype not in (torch.float32, torch.float64):
        return COARSE
    fine = torch.full((PROBE, PROBE), 1 + 2.0**-12, dtype=dtype, device=device)
    product = torch.eye(PROBE, dtype=dtype, device=device) @ fine
    return FINE if torch.equal(product.to(dtype), fine) else COARSE


@contextmanager
def explained(problem: str, advice: str) -> Iterator[None]:
    """Context manager: what a model of another make stumbles over becomes an error that says so.

    Args:
        problem: What then cannot be done, such as ``The blocks of GPT2LMHeadModel cannot be run on
            their own``.
        advice: What to do instead.

    Raises:
        ModelError: In place of errors that come from the model's code.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as reason:
        if isinstance(reason, torch.OutOfMemoryError) or tells_of_loss(reason):
            raise
        raise ModelError(f"{problem} ({type(reason).__name__}: {reason}). {advice}") from reason


@contextmanager
def running(forwards: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """Context manager: modules run something else in place of their ``forward``."""
    # Other packages put a method of their own into the instance.
    kept = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in kept.items():
            if own is None:
                vars(module).pop("forward", None)
            else:
                module.forward = own


def with_cache(
    args: tuple[object, ...], kwargs: dict[str, object], cache: Cache | Prefix
) -> tuple[tuple[object, ...], dict[str, object]]:
    """A block's arguments with another cache of keys and values, in a new dict."""
    from transformers import Cache

    def swap(value: object) -> object:
        return cache if isinstance(value, Cache) else value

    return tuple(swap(a) for a in args), {name: swap(v) for name, v in kwargs.items()}


def vocabulary_projection(tree: ModelTree) -> nn.Module:
    """A model's projection to the vocabulary.

    Args:
        tree: Where the model's parts are.

    Raises:
        ModelError: If it has none.
    """
    if tree.lm_head is None:
        raise ModelError(
            f"{type(tree.model).__name__} has no projection to the vocabulary. Load it with "
            "AutoModelForCausalLM."
        )
    return tree.lm_head


def scaled_logits(model: nn.Module, logits: Tensor) -> Tensor:
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
        if factor := getattr(config, name, None):
            logits = logits * factor**power
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
