# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Some rows of a pass answered by another model, which reads a text before them."""

# Shapes: B rows, H rows of them that are answered, T positions, K positions whose logits are kept,
# W positions of the other model's rows, V vocabulary.

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_edit.core.batch import pad_rows

if TYPE_CHECKING:
    from transformers import Cache, DynamicCache, PreTrainedModel

__all__ = ["Asked", "SecondOpinion"]


@dataclass(frozen=True)
class Asked:
    """What a pass of a language model was given.

    Args:
        ids: Tokens, [B, T]; those of the decoder where there is an encoder.
        attended: Which of them are no padding, [B, T] bool.
        heard: What an encoder has read for each row; None where there is no encoder.
        goes_on: Whether the pass continues rows whose prompts were read before.
    """

    ids: Tensor
    attended: Tensor
    heard: Sequence[Sequence[int]] | None = None
    goes_on: bool = False


class SecondOpinion:
    """Runs another model on some rows, and keeps its keys and values behind those of the first.

    They are further layers of the same cache, of as many rows, and the last one is the mask of what
    they hold. So whatever reorders, selects or copies rows of a cache does it with both.

    Args:
        is_encoder_decoder: Whether the models have encoders.
    """

    def __init__(self, *, is_encoder_decoder: bool) -> None:
        self.is_encoder_decoder = is_encoder_decoder
        self._layers = 0  # that the other model's keys and values take

    def __call__(
        self,
        model: PreTrainedModel,
        logits: Tensor,
        asked: Asked,
        route: Tensor,
        texts: Sequence[Sequence[int]],
        cache: Cache | None = None,
        keep: int | Tensor = 0,
    ) -> Tensor:
        """Logits with those of the other model in the rows that it answers.

        Args:
            model: The other model, with the vocabulary of the first.
            logits: Those of the first, [B, K, V].
            asked: What it was given.
            route: The text that each row is answered in the light of, −1 for none, [B].
            texts: Token ids of the texts.
            cache: Keys and values of the first; None where none are kept.
            keep: Which positions have logits: the last so many, all if 0, or their columns.

        Returns:
            [B, K, V]; rows that are not answered keep their bits.
        """
        hits = torch.nonzero(route >= 0)[:, 0]
        columns = torch.arange(asked.ids.shape[1], device=logits.device)
        columns = columns[-keep:] if isinstance(keep, int) else columns[keep]
        read = [texts[i] for i in route[hits].tolist()]
        if self.is_encoder_decoder:
            answers = self._decode(model, asked, read, cache, hits)[:, columns]
            is_said = torch.ones(answers.shape[:2], dtype=torch.bool, device=logits.device)
        else:
            answers = self._continue(model, asked, read, cache, hits, columns)
            is_said = asked.attended[hits][:, columns]
        found = logits.clone()
        found[hits] = torch.where(is_said[..., None], answers.to(logits.dtype), logits[hits])
        return found

    def _continue(
        self,
        model: PreTrainedModel,
        asked: Asked,
        texts: Sequence[Sequence[int]],
        cache: Cache | None,
        hits: Tensor,
        columns: Tensor,
    ) -> Tensor:
        """Answers of a decoder-only model at some columns of its rows, [H, K, V]."""
        from transformers import DynamicCache

        attended = asked.attended[hits]
        given: dict[str, object] = {}
        if asked.goes_on:
            ids, mask = asked.ids[hits], attended.long()
            before, seen = self._taken(cache, hits)
            mask = torch.cat([seen, mask], 1)
            places = columns.expand(len(hits), -1)
        else:
            rows = [
                [*text, *asked.ids[b][asked.attended[b]].tolist()]
                for text, b in zip(texts, hits, strict=True)
            ]
            ids, mask = (t.to(hits.device) for t in pad_rows(rows, 0, side="left"))
            before = DynamicCache() if cache is not None else None
            # The tokens of a row stand together at the end of the longer one.
            ranks = attended.cumsum(1) - attended.sum(1, keepdim=True) + ids.shape[1] - 1
            places = ranks[:, columns]
        width = ids.shape[1]
        wanted = places[attended[:, columns]]
        first = int(wanted.min()) if wanted.numel() else width - 1
        parameters = inspect.signature(model.forward).parameters
        if "logits_to_keep" in parameters:
            given["logits_to_keep"] = width - first
        if "position_ids" in parameters:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -width:]
        logits: Tensor = model(
            input_ids=ids,
            attention_mask=mask,
            cache=before,
            use_cache=before is not None,
            **given,
        ).logits
        if before is not None:
            layers = [(layer.keys, layer.values) for layer in before.layers]
            self._keep(cache, layers, mask, hits, asked)
        at = (places - (width - logits.shape[1])).clamp_min(0)
        return logits[torch.arange(len(hits), device=hits.device)[:, None], at]

    def _decode(
        self,
        model: PreTrainedModel,
        asked: Asked,
        texts: Sequence[Sequence[int]],
        cache: Cache | None,
        hits: Tensor,
    ) -> Tensor:
        """Answers of a decoder whose encoder reads text and prompt, [H, T, V]."""
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        given: dict[str, object] = {}
        if asked.goes_on:
            taken, mask = self._taken(cache, hits)
            half = len(taken.layers) // 2
            parts = DynamicCache(), DynamicCache()
            parts[0].layers, parts[1].layers = taken.layers[:half], taken.layers[half:]
            before = EncoderDecoderCache(*parts)
            # Its keys and values are known already: only its length is asked for.
            states = taken.layers[0].keys.new_zeros(*mask.shape, 1)
            given["encoder_outputs"] = BaseModelOutput(last_hidden_state=states)
        else:
            heard = asked.heard or []
            rows = [[*text, *heard[int(b)]] for text, b in zip(texts, hits, strict=True)]
            ids, mask = (t.to(hits.device) for t in pad_rows(rows, 0))
            given["input_ids"] = ids
            both = DynamicCache(), DynamicCache()
            before = EncoderDecoderCache(*both) if cache is not None else None
        logits: Tensor = model(
            attention_mask=mask,
            decoder_input_ids=asked.ids[hits],
            cache=before,
            use_cache=before is not None,
            **given,
        ).logits
        if cache is not None:
            sides = (before.self_attention_cache, before.cross_attention_cache)
            layers = [(layer.keys, layer.values) for side in sides for layer in side.layers]
            self._keep(cache.self_attention_cache, layers, mask, hits, asked)
        return logits

    def _taken(self, cache: Cache, hits: Tensor) -> tuple[DynamicCache, Tensor]:
        """The other model's keys and values of some rows, and the mask of these, [H, W]."""
        from transformers import DynamicCache

        held = getattr(cache, "self_attention_cache", cache).layers[-(self._layers + 1) :]
        taken = DynamicCache()
        for i, layer in enumerate(held[:-1]):
            taken.update(layer.keys[hits], layer.values[hits], i)
        return taken, held[-1].keys[hits, 0, :, 0].long()

    def _keep(
        self,
        cache: Cache,
        layers: Sequence[tuple[Tensor, Tensor]],
        mask: Tensor,
        hits: Tensor,
        asked: Asked,
    ) -> None:
        """Puts keys and values of some rows behind the layers of a cache, in place of earlier."""
        from transformers import DynamicCache

        held = mask.to(layers[0][0].dtype)[:, None, :, None]
        whole = DynamicCache()
        for i, pair in enumerate([*layers, (held, held)]):
            keys, values = (
                t.new_zeros(len(asked.ids), *t.shape[1:]).index_copy(0, hits, t) for t in pair
            )
            whole.update(keys, values, i)
        if asked.goes_on:
            del cache.layers[-(self._layers + 1) :]
        self._layers = len(layers)
        cache.layers.extend(whole.layers)
