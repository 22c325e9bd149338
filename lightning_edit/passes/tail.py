# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Only the part of a forward pass that an edit of one position can change.

In a causal model a change at the subject's last token leaves every layer below and every
position before as it was. Rows are therefore split at the subject: what stands before lies in
a cache of keys and values, computed once; what follows runs again from the edited layer only.
"""

# Shapes: N rows, P positions before the subject's last token, Q positions from it on, D hidden,
# M inputs of the edited projection, V vocabulary, C outputs that change: one, or two (of the MLP
# and of attention).

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_edit.core.batch import pad_rows
from lightning_edit.core.errors import ModelError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.sharding import is_sharded, plain
from lightning_edit.passes.attention import quick_attention, short_attention
from lightning_edit.passes.block_recorder import (
    BlockOutput,
    entering_states,
    hidden_states,
    recorded_blocks,
    with_hidden_states,
)
from lightning_edit.passes.blocks import (
    Prefix,
    explained,
    rounding_limit,
    scaled_logits,
    vocabulary_projection,
    with_cache,
)
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.hooks import hooked
from lightning_edit.passes.transfers import sent

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["Place", "Tail", "split_rows"]

Place = Literal["mlp", "block", "sublayers"]

ADVICE = "Choose another model, or a method that needs no target values, such as FineTune or LoRA."


def split_rows(
    rows: Sequence[Sequence[int]], splits: Sequence[int], pad_id: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Aligns rows at a position of each: what stands before it left-padded, the rest right-padded.

    Args:
        rows: Token ids of N rows.
        splits: Index of the position of each row that becomes column 0 of the second part.
        pad_id: Fills the gaps.

    Returns:
        Ids before [N, P], their mask, ids from the position on [N, Q], their mask; all int64.

    Examples:
        >>> before, _, after, mask = split_rows([[5, 6, 7], [8, 9]], [2, 0], 0)
        >>> before.tolist(), after.tolist(), mask.tolist()
        ([[5, 6], [0, 0]], [[7, 0], [8, 9]], [[1, 0], [1, 1]])
    """
    before = [list(row[:s]) for row, s in zip(rows, splits, strict=True)]
    after = [list(row[s:]) for row, s in zip(rows, splits, strict=True)]
    return (*pad_rows(before, pad_id, side="left"), *pad_rows(after, pad_id))


@dataclass
class Tail:
    """A batch of rows, ready to be run again from one layer on.

    Built by ``capture``; ``hidden`` then runs the rest for a change at column 0.

    Args:
        tree: Where the model's parts are.
        layer: The edited layer.
        keys: Input of the edited projection at column 0, [N, M].
        values: What changes at column 0, as it was, [N, C, D]: the edited projection's output, that
            and the output of attention's last projection, or the residual stream after the block.
        state: Residual stream that enters the first block of ``calls``, [N, Q, D].
        calls: Blocks to run, each with the arguments that it got in the captured pass.
        prefix: Cached keys and values of the positions before.
        inside: The change goes through the edited block, since something stands between what
            changes and the residual stream: a norm after the MLP, as in Gemma 2, or the MLP after
            attention.
        dtype: Precision of the matrix products if lower than the model's; see ``lower``.
        matrices: Copies of modules' matrices in that precision.
    """

    tree: ModelTree
    layer: int
    keys: Tensor
    values: Tensor
    state: Tensor
    calls: list[tuple[nn.Module, tuple[object, ...], dict[str, object]]]
    prefix: Prefix
    inside: bool
    dtype: torch.dtype | None = None
    matrices: dict[nn.Module, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def capture(
        cls,
        tree: ModelTree,
        layer: int,
        rows: Sequence[Sequence[int]],
        splits: Sequence[int],
        pad_id: int,
        place: Place = "mlp",
    ) -> Tail:
        """Runs the rows once through the whole model and keeps what later runs need.

        The row with the longest prefix is also run by the model alone, since a model may do more
        than pass keys and values from position to position, or scale its logits.

        Args:
            tree: A decoder-only model.
            layer: The layer whose MLP output changes.
            rows: Token ids of N rows.
            splits: Index of the subject's last token in each row.
            pad_id: Fills the gaps.
            place: What changes at column 0: the output of the ``mlp``, that of the whole ``block``,
                or those of both its ``sublayers``, MLP and attention.

        Raises:
            ModelError: If the model's blocks cannot be run on their own.
        """
        problem = f"The blocks of {type(tree.model).__name__} cannot be run on their own"
        with explained(problem, ADVICE):
            tail = cls._capture(tree, layer, rows, splits, pad_id, place)
            error = tail._difference(rows, splits)
        if not error < rounding_limit(tail.state.dtype, tail.state.device):
            raise ModelError(
                f"The blocks of {type(tree.model).__name__}, run on their own, give logits that "
                f"differ by {error:.0%} from the model's: it does something else between its "
                f"positions or after its last block. {ADVICE}"
            )
        return tail

    @classmethod
    def _capture(
        cls,
        tree: ModelTree,
        layer: int,
        rows: Sequence[Sequence[int]],
        splits: Sequence[int],
        pad_id: int,
        place: Place,
    ) -> Tail:
        from transformers import DynamicCache

        layer = tree.index(layer)
        model: PreTrainedModel = tree.model
        device = next(tree.blocks[0].parameters()).device
        parts = (sent(part, device) for part in split_rows(rows, splits, pad_id))
        before_NP, mask_NP, after_NQ, mask_NQ = parts
        mask = torch.cat([mask_NP, mask_NQ], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        width = before_NP.shape[1]
        cache = DynamicCache()
        dtype = next(tree.blocks[0].parameters()).dtype
        with torch.no_grad(), borrowed(model), quick_attention(device, dtype):
            if width:
                model.base_model(
                    input_ids=before_NP,
                    attention_mask=mask_NP,
                    position_ids=positions[:, :width],
                    cache=cache,
                    use_cache=True,
                )
            prefix = Prefix(_masked(cache, mask_NP))
            for i, (keys, values) in prefix.layers.items():
                cache.layers[i].keys, cache.layers[i].values = keys, values
            recorded = recorded_blocks(tree.blocks, layer, keep=(layer, layer + 1))
            outputs = _recorded_outputs(tree, layer, attention=place == "sublayers")
            with recorded as seen, outputs as edited:
                model.base_model(
                    input_ids=after_NQ,
                    attention_mask=mask,
                    position_ids=positions[:, width:],
                    cache=cache,
                    use_cache=True,
                )
            values = torch.stack(edited.values, 1)
            tail = cls(tree, layer, edited.key, values, seen.states[layer], [], prefix, inside=True)
            blocks = [*enumerate(tree.blocks)][layer:]
            tail.calls = [(b, *with_cache(*seen.arguments[i], prefix)) for i, b in blocks]
            after = seen.states[layer + 1]
            if place == "block":
                tail.values = after[:, :1].clone()
            if place == "block" or (place == "mlp" and tail._adds_up(after)):
                tail.inside, tail.state, tail.calls = False, after, tail.calls[1:]
        return tail

    def hidden(self, change: Tensor) -> Tensor:
        """Final hidden states, before the last norm, with a change of what was captured.

        Args:
            change: Added to ``values`` at column 0, [N, C, D].

        Returns:
            Residual stream after the last block, [N, Q, D].
        """
        state, calls = self.state, self.calls
        with short_attention(state.device, self.dtype or state.dtype), self._precision():
            if self.inside:
                with self._added(change):
                    state = self._run(*calls[0], state)
                calls = calls[1:]
            else:
                first = state[:, :1] + change.to(state.dtype)
                state = torch.cat([first, state[:, 1:]], 1)
            for call in calls:
                state = self._run(*call, state)
        return state

    def lower(self, dtype: torch.dtype) -> Tail:
        """The tail with matrix products in a lower precision, as autocast would have them.

        Matrices are converted here, once, where autocast would do it in every pass, as it does with
        those of a sharded model. The residual stream, norms and all sums of ``logits`` stay as they
        are.
        """
        if is_sharded(self.tree.model):
            return replace(self, dtype=dtype)
        modules = [block for block, _, _ in self.calls]
        if self.tree.lm_head is not None:
            modules.append(self.tree.lm_head)
        matrices = {
            module: {
                name: parameter.detach().to(dtype)
                for name, parameter in module.named_parameters()
                if parameter.ndim == 2 and parameter.dtype == torch.float32
            }
            for module in modules
        }
        return replace(self, dtype=dtype, matrices=matrices)

    def _precision(self) -> torch.autocast:
        on = self.dtype is not None
        return torch.autocast(self.state.device.type, dtype=self.dtype, enabled=on)

    def _run(
        self,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        state: Tensor,
    ) -> Tensor:
        lowered = self.matrices.get(module)
        if not lowered:
            return hidden_states(module(state, *args, **kwargs))
        return hidden_states(functional_call(module, lowered, (state, *args), kwargs))

    def logits(self, state: Tensor) -> Tensor:
        """Next-token logits of hidden states [..., D], as float32 [..., V]."""
        if self.tree.final_norm is not None:
            state = self.tree.final_norm(state)
        head = vocabulary_projection(self.tree)
        with self._precision():
            logits = self._run(head, (), {}, state)
        return scaled_logits(self.tree.model, logits)

    def select(self, rows: Tensor) -> Tail:
        """The tail of some of the rows, [n] int64."""
        count = self.state.shape[0]
        prefix = self.prefix.select(rows)

        def pick(value: object, name: str = "") -> object:
            if value is self.prefix:
                return prefix
            if name == "position_bias":  # of each head
                return value
            if name == "alibi" and isinstance(value, Tensor):  # of each row's heads
                return torch.unflatten(value, 0, (count, -1))[rows].flatten(0, 1)
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == count:
                return value[rows]
            if isinstance(value, tuple):
                return tuple(pick(v) for v in value)
            return value

        calls = [
            (
                block,
                tuple(pick(arg) for arg in args),
                {name: pick(v, name) for name, v in kwargs.items()},
            )
            for block, args, kwargs in self.calls
        ]
        return replace(
            self,
            keys=self.keys[rows],
            values=self.values[rows],
            state=self.state[rows],
            calls=calls,
            prefix=prefix,
        )

    def _difference(self, rows: Sequence[Sequence[int]], splits: Sequence[int]) -> float:
        """Relative difference of a row's logits from those that the model itself gives."""
        if self.tree.lm_head is None:
            return 0.0
        n = max(range(len(rows)), key=lambda n: splits[n])
        model: PreTrainedModel = self.tree.model
        device = self.state.device
        with torch.no_grad():
            tail = self.select(torch.tensor([n], device=device))
            state = tail.hidden(torch.zeros_like(tail.values))
            found = tail.logits(state[0, : len(rows[n]) - splits[n]])
            row = torch.tensor([list(rows[n])], device=device)
            own = model(input_ids=row, use_cache=False).logits[0, splits[n] :].float()
            if not bool(own.isfinite().all()):
                return 0.0  # of such a model the losses tell, which name the request
            return float((found - own).norm() / own.norm())

    def _added(self, change: Tensor) -> AbstractContextManager[None]:
        """Context manager: a change, [N, C, D], of what the edited block's parts return."""
        parts = [self.tree.mlp(self.layer)]
        if change.shape[1] > 1:
            parts.append(self.tree.attention_out(self.layer).module(self.tree.model))
        changes = zip(parts, change.unbind(1), strict=True)
        return hooked({part: _adder(added) for part, added in changes})

    def _adds_up(self, after: Tensor) -> bool:
        """Whether the MLP's output goes straight into the residual stream."""
        sound = self.values.isfinite().all(-1)[:, 0]
        if not bool(sound.any()):
            return True  # of such rows the losses tell
        nudge = torch.full_like(self.values, float(self.values[sound].abs().mean()))
        block, args, kwargs = self.calls[0]
        with self._added(nudge):
            moved = hidden_states(block(self.state, *args, **kwargs))[sound, 0]
        wanted = after[sound, 0] + nudge[sound, 0]
        return bool(torch.allclose(moved, wanted, rtol=1e-3, atol=1e-3 * float(nudge.max())))


@dataclass
class _Outputs:
    """What goes through the edited block's projections at column 0.

    Args:
        key: What enters the edited projection, [N, M].
        values: Outputs of the MLP and, where it is asked for, of attention, [N, D] each.
    """

    key: Tensor
    values: list[Tensor]


@contextmanager
def _recorded_outputs(tree: ModelTree, layer: int, *, attention: bool) -> Iterator[_Outputs]:
    """Context manager: records what goes through the edited block's projections."""
    mlp = tree.mlp_site(layer)
    sites = [mlp, *([tree.attention_out(layer)] if attention else [])]
    seen = _Outputs(torch.empty(0), [torch.empty(0) for _ in sites])
    count = 0

    def enter(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nonlocal count
        count = entering_states(args, kwargs).shape[0]

    def column_0(states: Tensor) -> Tensor:
        # Some models flatten batch and positions before the MLP, and some (Falcon) add attention's
        # output to the MLP's in place.
        return states.reshape(count, -1, states.shape[-1])[:, 0].clone()

    def leave(place: int) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Tensor, ...], output: BlockOutput) -> None:
            seen.values[place] = column_0(hidden_states(output))
            if not place:
                seen.key = mlp.keys(tree.model, column_0(plain(args[0])))

        return record

    after = {site.module(tree.model): leave(place) for place, site in enumerate(sites)}
    with hooked(after, {tree.blocks[layer]: enter}):
        yield seen


def _adder(change: Tensor) -> Callable[..., BlockOutput]:
    """A hook that adds a change to a module's output at column 0."""

    def add(_: nn.Module, __: object, output: BlockOutput) -> BlockOutput:
        whole = hidden_states(output)
        rows = whole.reshape(change.shape[0], -1, whole.shape[-1])
        moved = torch.cat([rows[:, :1] + change[:, None].to(rows.dtype), rows[:, 1:]], 1)
        return with_hidden_states(output, moved.reshape(whole.shape))

    return add


def _masked(cache: Cache, mask_NP: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values by layer, zero on padding: a row of nothing but padding makes them NaN."""
    kept = mask_NP.bool()[:, None, :, None]
    layers: dict[int, tuple[Tensor, Tensor]] = {}
    for i, layer in enumerate(cache.layers):
        if layer.keys is not None and layer.keys.ndim == 4:
            layers[i] = (
                torch.where(kept, layer.keys, 0.0),
                torch.where(kept, layer.values, 0.0),
            )
    return layers
