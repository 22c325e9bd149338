# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Texts as vectors, by which a memory finds what a prompt is about."""

# Shapes: B texts, T tokens, D hidden.

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_edit.core.batch import PromptTokenizer, pad_rows
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.sharding import ends_whole
from lightning_edit.memories.text_encoder import (
    TextEncoder,
    check_pooling,
    load_encoder,
    mean_states,
)
from lightning_edit.passes.block_recorder import recorded_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["encode_by_folder", "encode_by_model"]

MAX_TEXTS = 64  # run at once
# Depth at which a language model's states are read. Further up they are of what comes next, and
# prompts of one wording look all alike.
DEPTH = 1 / 6


def encode_by_model(
    model: PreTrainedModel, tokens: PromptTokenizer, texts: Sequence[str]
) -> Tensor:
    """Vectors out of a language model's own hidden states, behind the first sixth of its blocks.

    The blocks above are not run.

    Args:
        model: A Hugging Face language model; of one with an encoder, that is run alone.
        tokens: Its tokenizer.
        texts: Plain texts; no chat template is put around them.

    Returns:
        [B, D] float32, of length one, on the model's device.
    """
    device = next(model.parameters()).device
    blocks = ModelTree.of(model, "encoder" if tokens.is_encoder_decoder else "decoder").blocks
    layer = min(max(1, round(DEPTH * len(blocks))), len(blocks) - 1)
    part = model.get_encoder() if tokens.is_encoder_decoder else model.base_model
    given = {} if tokens.is_encoder_decoder else {"use_cache": False}

    def run(chosen: Sequence[str]) -> Tensor:
        rows = [tokens.tokenizer(text)["input_ids"] for text in chosen]
        ids, mask = (tensor.to(device) for tensor in pad_rows(rows, tokens.pad_id))
        with recorded_blocks(blocks, layer, layer, stops=True) as seen, ends_whole(model):
            part(input_ids=ids, attention_mask=mask, **given)
        return mean_states(seen.states[layer], mask)

    return _in_parts(run, texts)


def encode_by_folder(folder: str, pooling: str, texts: Sequence[str]) -> Tensor:
    """Vectors by an encoder out of a folder, such as one that sentence-transformers saved.

    Args:
        folder: As in ``load_encoder``.
        pooling: How it is expected to pool states.
        texts: Texts to encode; what is too long for the encoder is cut.

    Returns:
        [B, D] float32, scaled to length one, so that their products are cosines; on the CPU.

    Raises:
        ArtifactError: If it pools states in another way.
        MissingDependencyError: If sentence-transformers is needed and not installed.
        ModelError: If there is no such encoder.
    """
    encoder = _kept(folder)
    check_pooling(folder, encoder.pooling, pooling)
    return torch.nn.functional.normalize(_in_parts(encoder, texts), dim=1)


@torch.no_grad()
def _in_parts(run: Callable[[Sequence[str]], Tensor], texts: Sequence[str]) -> Tensor:
    """Runs texts of like length together and gives their vectors in the order asked for."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [
        run([texts[i] for i in order[start : start + MAX_TEXTS]])
        for start in range(0, len(order), MAX_TEXTS)
    ]
    vectors = torch.cat(parts)
    back = torch.empty(len(order), dtype=torch.long, device=vectors.device)
    back[torch.tensor(order, device=vectors.device)] = torch.arange(
        len(order), device=vectors.device
    )
    return vectors[back]


@cache
def _kept(folder: str) -> TextEncoder:
    encoder = load_encoder(folder)
    encoder.transformer.requires_grad_(False)
    encoder.head.requires_grad_(False)
    return encoder
