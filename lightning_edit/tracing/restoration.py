# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Corrupted copies of a prompt's run, and what putting parts of the clean run into them gives.

What a restoration at token t and layer l cannot change is not run again. The copies' states below
l are known from the corrupted run; their positions before t lie in a cache of keys and values; of
the vocabulary only the last position is asked. All restorations of one token go upward in one
batch, which each joins at its own layer.
"""

# Shapes: S noisy copies, N subject tokens, T tokens, Q = T - t tokens from the restored one on,
# P restorations, R = P * S rows, D hidden, V vocabulary.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from lightning_edit.core.errors import LocatorError, ModelError
from lightning_edit.core.locator import ModelTree
from lightning_edit.passes.attention import short_attention
from lightning_edit.passes.block_recorder import Arguments, hidden_states, recorded_blocks
from lightning_edit.passes.blocks import (
    Prefix,
    explained,
    rounding_limit,
    scaled_logits,
    with_cache,
)
from lightning_edit.passes.hooks import hooked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KINDS", "CorruptedRun", "Kind", "Restoration", "noisy_embeddings"]

Kind = Literal["hidden", "mlp", "attention"]
KINDS: tuple[Kind, ...] = ("hidden", "mlp", "attention")
# Rows whose whole vocabulary is held at once.
HEAD_ROWS = 256


@dataclass(frozen=True)
class Restoration:
    """What is put back: outputs of blocks, MLPs or attentions of the layers from start to stop.

    Args:
        kind: ``hidden`` for a block's output, ``mlp`` or ``attention`` for that of a part of it.
        start: The first layer.
        stop: One more than the last layer.
    """

    kind: Kind
    start: int
    stop: int

    @property
    def entry(self) -> int:
        """The first block whose run differs from the corrupted one."""
        return self.start + 1 if self.kind == "hidden" else self.start


class CorruptedRun:
    """A prompt's clean run and its copies with noise on the subject, ready for restorations.

    Args:
        tree: A decoder-only model, in eval mode.
        ids: The prompt's T tokens.
        subject: The subject's tokens.
        noise: Added to the subject's embeddings in each copy, [S, N, D].

    Raises:
        ModelError: If the model has an encoder, or its blocks cannot be run on their own.
    """

    def __init__(self, tree: ModelTree, ids: Sequence[int], subject: range, noise: Tensor) -> None:
        name = type(tree.model).__name__
        if tree.is_encoder_decoder or tree.lm_head is None or tree.input_embeddings is None:
            raise ModelError(
                f"Causal tracing needs a decoder-only model with token embeddings and a "
                f"projection to the vocabulary, but {name} is none. Choose another model."
            )
        try:
            #: The modules whose outputs are restored. The last projections, since what contains
            #: them adds the residual stream in some models (Bloom).
            self._parts: dict[Kind, list[nn.Module]] = {
                "mlp": [tree.mlp_out(i).module(tree.model) for i in range(len(tree.blocks))],
                "attention": [
                    tree.attention_out(i).module(tree.model) for i in range(len(tree.blocks))
                ],
            }
        except LocatorError as reason:
            raise ModelError(
                f"Causal tracing restores the outputs of MLPs and attentions, which {name} has "
                f"not in every layer. {reason}"
            ) from reason
        self.tree, self.subject = tree, subject
        self.samples = noise.shape[0]
        self._device = next(tree.blocks[0].parameters()).device
        self._ids_T = torch.tensor(list(ids), device=self._device)
        self._noise = noise
        #: What enters each block, and what leaves the last one: clean, then the copies,
        #: [1 + S, T, D] each.
        self._states: list[Tensor] = []
        #: Clean outputs of the parts of each block, [T, D] each.
        self._clean: dict[Kind, list[Tensor]] = {}
        advice = "Its facts cannot be traced. Choose another model."
        problem = f"The blocks of {name} cannot be run on their own"
        with explained(problem, advice), torch.no_grad():
            self._capture()
            logits_RV = self._logits(self._states[-1][:, -1])
        probabilities_RV = logits_RV.softmax(-1)
        #: The token that the clean model answers with.
        self.answer = int(probabilities_RV[0].argmax())
        #: Its probability in the clean run, and its mean over the corrupted copies.
        self.high = float(probabilities_RV[0, self.answer])
        self.low = float(probabilities_RV[1:, self.answer].mean())

    @torch.no_grad()
    def check(self) -> None:
        """Compares running the blocks alone with running the model, for the corrupted copies.

        Raises:
            ModelError: If the model does more than pass states from block to block.
        """
        model: PreTrainedModel = self.tree.model
        nothing = Restoration("mlp", 0, 0)
        found_SV = self._logits(self._run(self.subject.start, [nothing]))
        with noisy_embeddings(self.tree, self.subject, self._noise, first=0):
            rows = self._ids_T.expand(self.samples, -1)
            own_SV = model(input_ids=rows, use_cache=False).logits[:, -1].float()
        error = float((found_SV - own_SV).norm() / own_SV.norm())
        if not error < rounding_limit(self._precision(), rows.device):
            raise ModelError(
                f"The blocks of {type(model).__name__}, run on their own, give logits that differ "
                f"by {error:.0%} from the model's, so its facts cannot be traced. Choose another "
                "model."
            )

    @torch.no_grad()
    def restore(self, token: int, restorations: Sequence[Restoration]) -> Tensor:
        """Mean probability of the answer over the copies, with one token's states put back.

        Args:
            token: The token, from the subject's first one on; before it nothing is corrupted.
            restorations: P of them, run in one batch of P * S rows.

        Returns:
            One probability a restoration, [P] float32.
        """
        last_RD = self._run(token, restorations)
        parts = [last_RD[at : at + HEAD_ROWS] for at in range(0, len(last_RD), HEAD_ROWS)]
        found_R = torch.cat([self._logits(part).softmax(-1)[:, self.answer] for part in parts])
        return found_R.view(-1, self.samples).mean(1).cpu()

    def _run(self, t: int, restorations: Sequence[Restoration]) -> Tensor:
        """States of the last position after the last block, [R, D]."""
        tree, states, samples = self.tree, self._states, self.samples
        entries, trunks = _forks(restorations)
        arguments = self._arguments(t)
        state = states[0][:0, t:]
        joined: list[int] = []
        for i in range(len(tree.blocks) + 1):
            joining = [n for n, entry in enumerate(entries) if entry == i]
            fresh = [states[i][1:, t:].clone() for _ in joining]
            for n, rows in zip(joining, fresh, strict=True):
                if trunks[n] != n:
                    at = joined.index(trunks[n]) * samples
                    rows[:] = state[at : at + samples]
                elif restorations[n].kind == "hidden":
                    rows[:, 0] = states[i][0, t]
            state = torch.cat([state, *fresh])
            joined += joining
            if i < len(tree.blocks) and joined:
                with self._restored(i, t, [restorations[n] for n in joined]):
                    state = self._block(i, t, state, *arguments[i])
        order = torch.tensor(joined, device=self._device).argsort()
        return state[:, -1].reshape(len(joined), samples, -1)[order].view(len(state), -1)

    def _block(
        self, i: int, t: int, state: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Tensor:
        keys, values = (part[1:, :, :t] for part in self._cache[i])
        prefix = Prefix({i: (keys, values)})
        args, kwargs = with_cache(args, kwargs, prefix)
        if isinstance(alibi := kwargs.get("alibi"), Tensor):  # of each row's heads
            kwargs["alibi"] = alibi.repeat(state.shape[0], 1, 1)
        with short_attention(state.device, self._precision()):
            return hidden_states(self.tree.blocks[i](state, *args, **kwargs))

    def _restored(
        self, i: int, t: int, restorations: Sequence[Restoration]
    ) -> AbstractContextManager[None]:
        """Context manager: a block's parts have clean outputs in the rows that restore them."""
        after = {}
        for kind, parts in self._parts.items():
            covered = [r.kind == kind and r.start <= i < r.stop for r in restorations]
            if any(covered):
                rows_R = torch.tensor(covered, device=self._device)
                rows_R = rows_R.repeat_interleave(self.samples)
                after[parts[i]] = _put(rows_R, self._clean[kind][i][t])
        return hooked(after)

    def _precision(self) -> torch.dtype:
        """Precision of matrix products: the caller's autocast's, or else the weights'."""
        kind = self._device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self._states[0].dtype

    def _capture(self) -> None:
        from transformers import DynamicCache

        tree = self.tree
        model: PreTrainedModel = tree.model
        cache = DynamicCache()
        rows = self._ids_T.expand(1 + self.samples, -1)
        after: dict[nn.Module, Callable[..., None]] = {}
        for kind, parts in self._parts.items():
            outputs = self._clean[kind] = []
            after |= {part: _keep(outputs, len(rows)) for part in parts}
        noise = noisy_embeddings(tree, self.subject, self._noise)
        with recorded_blocks(tree.blocks) as seen, hooked(after), noise:
            model.base_model(input_ids=rows, cache=cache, use_cache=True)
        self._states = [seen.states[i] for i in sorted(seen.states)]
        #: Keys and values of all rows in each layer.
        self._cache = [(layer.keys, layer.values) for layer in cache.layers]

    def _arguments(self, t: int) -> dict[int, Arguments]:
        """What the model gives each block for the tokens from t on, in a batch of one row."""
        from transformers import DynamicCache

        model: PreTrainedModel = self.tree.model
        cache = DynamicCache()
        if t:
            for i, (keys, values) in enumerate(self._cache):
                cache.update(keys[:1, :, :t], values[:1, :, :t], i)
        positions = torch.arange(len(self._ids_T), device=self._device)[None]
        with recorded_blocks(self.tree.blocks) as seen:
            model.base_model(
                input_ids=self._ids_T[None, t:],
                attention_mask=torch.ones_like(positions),
                position_ids=positions[:, t:],
                cache=cache,
                use_cache=True,
            )
        return seen.arguments

    def _logits(self, state: Tensor) -> Tensor:
        """Next-token logits of hidden states [R, D], as float32 [R, V]."""
        tree = self.tree
        if tree.final_norm is not None:
            state = tree.final_norm(state)
        return scaled_logits(tree.model, tree.lm_head(state))  # type: ignore[misc]


@contextmanager
def noisy_embeddings(
    tree: ModelTree, subject: range, noise: Tensor, first: int = 1
) -> Iterator[None]:
    """Context manager: noise is added to the subject's embeddings.

    Args:
        tree: Where the embedding is.
        subject: The subject's tokens.
        noise: One draw a row, [S, N, D].
        first: Rows before this one stay clean.
    """

    def add(_: nn.Module, __: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[first:, subject.start : subject.stop] += noise.to(output)
        return output

    if tree.input_embeddings is None:
        raise ModelError(f"{type(tree.model).__name__} has no token embeddings to corrupt.")
    with hooked({tree.input_embeddings: add}):
        yield


def _forks(restorations: Sequence[Restoration]) -> tuple[list[int], list[int]]:
    """Where each restoration leaves what has run already, and from which other one (or itself).

    Windows that start together are one until the shorter ends.
    """
    entries, trunks = [], []
    for n, one in enumerate(restorations):
        alike = [
            m
            for m, other in enumerate(restorations)
            if one.kind != "hidden"
            and (other.kind, other.start) == (one.kind, one.start)
            and one.stop > one.start
        ]
        trunk = max(alike, key=lambda m: restorations[m].stop, default=n)
        trunks.append(trunk)
        entries.append(one.entry if trunk == n else one.stop)
    return entries, trunks


def _keep(outputs: list[Tensor], rows: int) -> Callable[..., None]:
    # Some models flatten batch and positions before the MLP, and some (Falcon) add attention's
    # output to the MLP's in place.
    def keep(_: nn.Module, __: object, output: Tensor) -> None:
        outputs.append(output.reshape(rows, -1, output.shape[-1])[0].clone())

    return keep


def _put(rows_R: Tensor, clean_D: Tensor) -> Callable[..., Tensor]:
    def put(_: nn.Module, __: object, output: Tensor) -> Tensor:
        moved = output.reshape(rows_R.shape[0], -1, output.shape[-1]).clone()
        moved[rows_R, 0] = clean_D
        return moved.reshape(output.shape)

    return put
