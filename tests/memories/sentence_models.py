# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Tiny text encoders in folders, with random weights, plain or of sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_edit.demos import tiny_tokenizer

__all__ = ["save_encoder", "save_sentence_model"]

WIDTH = 16


def save_encoder(folder: Path) -> Path:
    """Saves a plain encoder of transformers, and its tokenizer."""
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * WIDTH,
        )
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_sentence_model(
    folder: Path, pooling: str, *, dense: bool = False, normalize: bool = False, **settings: Any
) -> Path:
    """Saves the encoder of ``save_encoder`` as sentence-transformers does.

    Args:
        folder: Where to.
        pooling: Mode of the pooling, such as ``cls``.
        dense: Whether a linear layer follows it.
        normalize: Whether vectors are scaled to length one.
        settings: Arguments of ``SentenceTransformer``.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    plain = save_encoder(folder.with_name(f"{folder.name}-plain"))
    modules: list[Any] = [Transformer(str(plain)), Pooling(WIDTH, pooling_mode=pooling)]
    if dense:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            modules.append(Dense(WIDTH, 5))
    if normalize:
        modules.append(Normalize())
    model = SentenceTransformer(modules=modules, device="cpu", **settings)
    model.save_pretrained(str(folder), create_model_card=False)
    return folder
