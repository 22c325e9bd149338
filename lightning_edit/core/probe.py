# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a linear map does in a model, seen by running it, where its name and place do not tell.

A block may hold more than attention and an MLP: a state space, a convolution, maps for embeddings
of each layer, low-rank detours. What sets the MLP apart is what it does: at each position its inner
value is a curved function of the hidden state there, and of nothing else.
"""

# Shapes: T positions, I inputs of a linear map.

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lightning_edit.core.linear_maps import linears, sizes

__all__ = ["Inner", "is_causal", "probed"]

LENGTH = 5  # tokens of a row
# Largest relative difference that rounding accounts for: of equal values, and of straight lines.
SAME = 1e-3
STRAIGHT = {torch.float32: 1e-3, torch.float64: 1e-6}
STRAIGHT_IN_HALF = 0.05

_FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Inner:
    """What enters a linear map.

    Args:
        order: When it runs among the linear maps of its stack.
        is_of_mlp: It is a curved function of the hidden state that is read at the same position,
            and of nothing else, neither other positions nor the token's embedding; and it is not
            just what another map has returned.
    """

    order: int
    is_of_mlp: bool


_INNERS: weakref.WeakKeyDictionary[nn.Module, Inner] = weakref.WeakKeyDictionary()
_CAUSAL: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def probed(
    model: nn.Module, blocks: Sequence[nn.Module], hidden_size: int, maps: Sequence[nn.Module]
) -> list[Inner | None]:
    """What enters some linear maps of a stack; a model is run for it once.

    Two rows of other tokens are read. In the second, whatever reads the hidden state is given at
    the last position what it read there in the first, and then two more points of a line through
    it. What is the same in both is its own, and what does not follow the line is curved.

    Args:
        model: A Hugging Face language model.
        blocks: The blocks of the stack.
        hidden_size: Width of the hidden state.
        maps: Linear maps of the stack.

    Returns:
        For each map what was seen; None for one that did not run, or not on all positions.

    Raises:
        RuntimeError: If the model cannot be run.
    """
    if not any(one in _INNERS for one in maps):
        try:
            _INNERS.update(_probe(model, blocks, hidden_size))
        except _FAILURES as reason:
            raise RuntimeError(f"{type(reason).__name__}: {reason}") from reason
    return [_INNERS.get(one) for one in maps]


def is_causal(model: nn.Module) -> bool:
    """Whether what a model says at a position is the same whatever follows.

    A model is run for it, once, only if neither its attention says so nor that it generates.

    Args:
        model: A Hugging Face language model without an encoder of its own.
    """
    can_generate = getattr(model, "can_generate", None)
    said = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if any(said) or (not said and can_generate is not None and can_generate()):
        return True
    if model not in _CAUSAL:
        try:
            with _running(model) as (one, other, device):
                rows = torch.tensor([one, [*one[:-1], other[-1]]], device=device)
                first: Tensor = model(input_ids=rows)[0][:, 0].float()
        except _FAILURES:
            return True  # what cannot be run is told where it is needed
        _CAUSAL[model] = bool(torch.allclose(first[0], first[1], rtol=1e-3, atol=1e-5))
    return _CAUSAL[model]


def _probe(
    model: nn.Module, blocks: Sequence[nn.Module], hidden_size: int
) -> dict[nn.Module, Inner]:
    with _running(model) as (one, other, device):

        def run(ids: list[int]) -> None:
            row = torch.tensor([ids], device=device)
            is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
            more = {"decoder_input_ids": row} if is_pair else {}
            model(input_ids=row, use_cache=False, **more)

        maps = [one for block in blocks for _, one in linears(block)]
        outputs: list[Tensor] = []
        with _recorded(maps, hidden_size, outputs=outputs) as natural:
            run(one)
        lines: list[dict[nn.Module, Tensor]] = []
        for step in range(3):
            points = {m: x + step * x.roll(1) for m, x in natural.items()}
            with _recorded(maps, hidden_size, points) as seen:
                run(other)
            lines.append(seen)
    inners: dict[nn.Module, Inner] = {}
    for order, (one_map, inner) in enumerate(natural.items()):
        if any(one_map not in line for line in lines):
            continue
        first, second, third = (line[one_map].float() for line in lines)
        size = max(float(x.norm()) for x in (first, second, third)) + 1e-30
        bend = float((first - 2 * second + third).norm()) / size
        is_own = float((first - inner.float()).norm()) <= SAME * size
        is_curved = bend > STRAIGHT.get(inner.dtype, STRAIGHT_IN_HALF)
        is_relayed = any(torch.equal(inner, output) for output in outputs)
        inners[one_map] = Inner(order, is_of_mlp=is_own and is_curved and not is_relayed)
    return inners


@contextmanager
def _running(model: nn.Module) -> Iterator[tuple[list[int], list[int], torch.device]]:
    """Context manager: a model in eval mode; gives two rows of tokens and where they go."""
    modes = [(module, module.training) for module in model.modules()]
    get: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)
    if get is None:
        raise TypeError("it names no token embedding")
    weight = cast(Tensor, get().weight)
    rows, device = weight.shape[0], weight.device
    start = rows // 3  # special tokens stand at the ends
    tokens = [(start + i) % rows for i in range(2 * LENGTH)]
    try:
        for module, mode in modes:
            if mode:
                module.training = False
        exact = torch.autocast(device.type, enabled=False)
        with torch.no_grad(), exact, torch.compiler.set_stance("force_eager"):
            yield tokens[:LENGTH], tokens[LENGTH:], device
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode


@contextmanager
def _recorded(
    maps: Sequence[nn.Module],
    hidden_size: int,
    points: Mapping[nn.Module, Tensor] | None = None,
    outputs: list[Tensor] | None = None,
) -> Iterator[dict[nn.Module, Tensor]]:
    """Context manager: what enters linear maps at the last position, [I], in the order they run.

    Args:
        maps: The linear maps.
        hidden_size: Inputs of those that read the hidden state.
        points: What those that read it get there instead.
        outputs: What they return there is put into it.
    """
    seen: dict[nn.Module, Tensor] = {}

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        if len(rows) != LENGTH:  # an expert gets the tokens that are sent to it
            return None
        seen[module] = rows[-1].clone()
        if points is None or module not in points or sizes(module)[1] != hidden_size:
            return None
        moved = torch.cat([rows[:-1], points[module][None].to(rows.dtype)])
        return (moved.reshape(args[0].shape), *args[1:])

    def leave(_: nn.Module, __: object, output: Tensor) -> None:
        if outputs is not None:
            outputs.append(output.reshape(-1, output.shape[-1])[-1].clone())

    with ExitStack() as stack:
        for one in maps:
            stack.callback(one.register_forward_pre_hook(enter).remove)
            stack.callback(one.register_forward_hook(leave).remove)
        yield seen
