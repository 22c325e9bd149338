# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Gradients with respect to scaled activations of all layers, in one growing pass.

A row whose MLP is changed in layer l at its last position is the same as the unchanged row in all
layers below, and at all positions before. So one row of one token climbs through the model, over
cached keys and values, and in each layer a few copies of it join, with the layer's activation
scaled. All of them reach the top together, and one backward pass gives every gradient.
"""

# Shapes: K positions that predict, L layers, S points, M neurons, R rows so far, V vocabulary.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_edit.core.errors import ModelError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.sharding import divided_again, plain
from lightning_edit.functional.knowledge_neurons import probability_gradient
from lightning_edit.passes.attention import short_attention
from lightning_edit.passes.block_recorder import Arguments, entering_states
from lightning_edit.passes.blocks import explained, rounding_limit
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.decoding import decoder_inputs
from lightning_edit.passes.hooks import hooked

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["ActivationPaths", "PathGradients"]

# Rows that climb together at most: more take memory and save no time.
MAX_ROWS = 640


@dataclass(frozen=True)
class PathGradients:
    """Gradients of a token's probability with respect to scaled activations.

    Args:
        activations: Inputs of the MLPs' last projections at the position, [L, M].
        gradients: Gradients at each point, [L, S, M] float32.
        probability: Probability of the token, nothing being scaled.
    """

    activations: Tensor
    gradients: Tensor
    probability: float


@dataclass(frozen=True)
class ActivationPaths:
    """A prompt with the beginning of an answer, ready to be run again from its last tokens.

    Built by ``capture``. Of an encoder-decoder model the tokens are the decoder's.

    Args:
        tree: Where the model's parts are.
        ids: Tokens of the row, [1, T].
        first: Position that predicts the first token of the answer.
        logits: Next-token logits at the positions from the first one on, [K, V].
        own: Cached keys and values of each layer over the whole row, [1, H, T, d].
        crossed: The same of the encoder's output; empty without an encoder.
        inputs: What else the model is called with.
    """

    tree: ModelTree
    ids: Tensor
    first: int
    logits: Tensor
    own: list[tuple[Tensor, Tensor]]
    crossed: list[tuple[Tensor, Tensor]]
    inputs: dict[str, object]

    @classmethod
    def capture(
        cls, tree: ModelTree, prompt: Sequence[int], answer: Sequence[int] = ()
    ) -> ActivationPaths:
        """Runs the row once and keeps what the runs of single positions need.

        Args:
            tree: A decoder-only or encoder-decoder model.
            prompt: Tokens of the prompt.
            answer: Tokens of the answer that are read before the last one is predicted.

        Raises:
            ModelError: If the model cannot be run over cached keys and values.

        Examples:
            >>> from lightning_edit.demos import tiny_model
            >>> paths = ActivationPaths.capture(ModelTree.of(tiny_model()), [5, 6, 7], [8])
            >>> tuple(paths.logits.shape)
            (2, 424)
        """
        from transformers import DynamicCache, EncoderDecoderCache

        model: PreTrainedModel = tree.model
        device = next(tree.blocks[0].parameters()).device
        ids = torch.tensor([list(prompt)], device=device)
        inputs: dict[str, object] = {}
        cache: Cache = DynamicCache()
        with torch.no_grad(), _explained(model):
            if tree.is_encoder_decoder:
                mask = torch.ones_like(ids)
                encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
                inputs = {"encoder_outputs": encoded, "attention_mask": mask}
                cache = EncoderDecoderCache(cache, DynamicCache())
                # The last label is read by nobody.
                labels = torch.tensor([[*answer, 0]], device=device)
                ids = decoder_inputs(model, labels)
                first = 0
            else:
                ids = torch.cat([ids, ids.new_tensor([list(answer)])], 1)
                first = len(prompt) - 1
            paths = cls(tree, ids, first, torch.empty(0), [], [], inputs)
            logits = model(**paths._arguments(0, ids.shape[1], cache)).logits[0, first:].float()
        own = getattr(cache, "self_attention_cache", cache)
        crossed = getattr(cache, "cross_attention_cache", DynamicCache())
        pairs = [[(layer.keys, layer.values) for layer in one.layers] for one in (own, crossed)]
        return cls(tree, ids, first, logits, pairs[0], pairs[1], inputs)

    def gradients(self, k: int, token: int, layers: Sequence[int], points: Tensor) -> PathGradients:
        """Gradients of a token's probability where the activations of one layer are scaled.

        Args:
            k: Which token of the answer, counted from 0, is predicted.
            token: Id of the token whose probability is meant.
            layers: Layers L, each of which is scaled by itself.
            points: Factors of the activations, [S], ascending.

        Raises:
            ModelError: If the model's last position cannot be run on its own.

        Examples:
            >>> from lightning_edit.demos import tiny_model
            >>> paths = ActivationPaths.capture(ModelTree.of(tiny_model()), [5, 6, 7])
            >>> found = paths.gradients(0, 8, [0, 1, 3], torch.tensor([0.0, 0.5, 1.0]))
            >>> tuple(found.gradients.shape), 0 < found.probability < 1
            ((3, 3, 128), True)
        """
        points = points.to(self.ids.device)
        width = max(1, (MAX_ROWS - 1) // max(1, len(points)))
        parts = [
            self._climb(k, token, layers[start : start + width], points)
            for start in range(0, len(layers), width)
        ]
        return PathGradients(
            torch.cat([part.activations for part in parts]),
            torch.cat([part.gradients for part in parts]),
            parts[0].probability,
        )

    def _climb(self, k: int, token: int, layers: Sequence[int], points: Tensor) -> PathGradients:
        """One pass up and down for some of the layers."""
        position = self.first + k
        cache = self._cache(position)
        # The unscaled row climbs anyway, and is the last point of every layer.
        has_whole = bool(points[-1] == 1)
        rows = _Rows(cache, points[:-1] if has_whole else points)
        model: PreTrainedModel = self.tree.model
        dtype = next(self.tree.blocks[0].parameters()).dtype
        short = short_attention(self.ids.device, dtype)
        with _explained(model), borrowed(model), short, rows.growing(self.tree, layers):
            logits = model(**self._arguments(position, position + 1, cache)).logits
        logits = logits.reshape(-1, logits.shape[-1])
        self._check(logits[0].detach().float(), self.logits[k])
        probabilities, gradient = probability_gradient(logits, token)
        leaves = rows.scaled + (rows.whole if has_whole else [])
        found = torch.autograd.grad(logits, leaves, gradient)
        gradients = torch.stack(found[: len(layers)])
        if has_whole:
            gradients = torch.cat([gradients, torch.stack(found[len(layers) :])], 1)
        activations = torch.cat([whole.detach() for whole in rows.whole])
        return PathGradients(activations, gradients.float(), float(probabilities[0]))

    def _arguments(self, start: int, end: int, cache: Cache) -> dict[str, object]:
        """Arguments of the model for the positions from ``start`` to ``end``."""
        shared = {"cache": cache, "use_cache": True, **self.inputs}
        if self.tree.is_encoder_decoder:
            return {"decoder_input_ids": self.ids[:, start:end], **shared}
        mask = torch.ones_like(self.ids[:, :end])
        return {"input_ids": self.ids[:, start:end], "attention_mask": mask, **shared}

    def _cache(self, length: int) -> Cache:
        """A cache of the first positions."""
        from transformers import DynamicCache, EncoderDecoderCache

        own, crossed = DynamicCache(), DynamicCache()
        if length:
            for i, (keys, values) in enumerate(self.own):
                own.update(keys[:, :, :length], values[:, :, :length], i)
        for i, (keys, values) in enumerate(self.crossed):
            crossed.update(keys, values, i)
        return EncoderDecoderCache(own, crossed) if self.tree.is_encoder_decoder else own

    def _check(self, found: Tensor, wanted: Tensor) -> None:
        error = float((found - wanted).norm() / wanted.norm())
        limit = rounding_limit(next(self.tree.blocks[0].parameters()).dtype, wanted.device)
        if not error < limit and bool(wanted.isfinite().all()):
            raise ModelError(
                f"{type(self.tree.model).__name__}, run on its last token over cached keys and "
                f"values, gives logits that differ by {error:.0%} from those of the whole row: it "
                "hands on something else between positions. Choose another model or method."
            )


def _explained(model: nn.Module) -> AbstractContextManager[None]:
    return explained(
        f"{type(model).__name__} cannot be run on its last token over cached keys and values",
        "Choose another model, or a method that needs no attribution, such as FineTune or LoRA.",
    )


class _Rows:
    """The rows of one pass: the unchanged one, and then those that joined it."""

    def __init__(self, cache: Cache, points: Tensor) -> None:
        #: Activations of the unchanged row, [1, M] a layer, in the graph.
        self.whole: list[Tensor] = []
        #: Scaled activations, [S, M] a layer, leaves of the graph.
        self.scaled: list[Tensor] = []
        self._caches = [
            getattr(cache, name)
            for name in ("self_attention_cache", "cross_attention_cache")
            if hasattr(cache, name)
        ] or [cache]
        self._points = points[:, None]

    @contextmanager
    def growing(self, tree: ModelTree, layers: Sequence[int]) -> Iterator[None]:
        """Context manager: rows join at the layers."""
        before: dict[nn.Module, Callable[..., object]] = {
            block: self._enter(i, joins=i in layers) for i, block in enumerate(tree.blocks)
        }
        before |= {tree.mlp_out(i).module(tree.model): self._scale for i in layers}
        with hooked(before=before):
            yield

    def _enter(self, i: int, *, joins: bool) -> Callable[..., Arguments]:
        def enter(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Arguments:
            state = entering_states(args, kwargs)
            if joins and len(self._points):
                same = state[:1].detach().expand(len(self._points), *state.shape[1:])
                state = torch.cat([state, same])
            kwargs = dict(kwargs)
            if isinstance(alibi := kwargs.get("alibi"), Tensor):  # of each row's heads
                kwargs["alibi"] = alibi.repeat(state.shape[0], *[1] * (alibi.ndim - 1))
            for cache in self._caches:
                if i < len(cache.layers) and cache.layers[i].is_initialized:
                    layer = cache.layers[i]
                    layer.keys = layer.keys.expand(state.shape[0], -1, -1, -1)
                    layer.values = layer.values.expand(state.shape[0], -1, -1, -1)
            if args:
                return (state, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": state}

        return enter

    def _scale(
        self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[Tensor, ...], dict[str, object]]:
        entering = plain(args[0])
        rows = entering.reshape(-1, entering.shape[-1])
        count = len(self._points)
        whole, earlier = torch.split(rows, [1, len(rows) - 1 - count, count])[:2]
        if not whole.requires_grad:
            whole = whole.detach().requires_grad_()
        # Exactly a multiple of the unchanged row, whatever the rounding of its copies.
        scaled = (self._points * whole.detach().float()).to(rows.dtype).requires_grad_()
        self.whole.append(whole)
        self.scaled.append(scaled)
        rows = torch.cat([whole, earlier, scaled]).reshape(entering.shape)
        return (divided_again(rows, args[0]), *args[1:]), kwargs
