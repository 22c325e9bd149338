# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Texts that a model writes itself: contexts for prompts, and rows to take statistics from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "BATCH_ROWS",
    "ROW_LENGTH",
    "sample_rows",
    "sample_templates",
    "sample_text_ids",
    "seeded",
]

# Words that the sampled contexts begin with.
OPENINGS = ("The", "Therefore", "Because", "I", "You")
CONTEXT_LENGTHS = (5, 10)  # tokens, openings included
ROW_LENGTH = 64  # tokens of one row of text
BATCH_ROWS = 64  # rows run at once: about four thousand tokens


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context manager: draws come from the seed, and leave the caller's draws alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def sample_templates(
    model: PreTrainedModel,
    tokens: PromptTokenizer,
    seed: int,
    per_kind: int = 2,
    lengths: Sequence[int] = CONTEXT_LENGTHS,
) -> list[str]:
    """Short contexts for a prompt, written by the model.

    Args:
        model: A decoder-only model, unedited.
        tokens: Its tokenizer.
        seed: Seed of the samples.
        per_kind: Contexts of each opening and length.
        lengths: Tokens of a context.

    Returns:
        Templates, twenty by default, such as ``"The first thing. {}"``.
    """
    rows = [tokens.tokenizer(word, add_special_tokens=False)["input_ids"] for word in OPENINGS]
    device = next(model.parameters()).device
    templates = []
    with seeded(seed), torch.no_grad():
        for length in lengths:
            for row in rows:
                start = torch.tensor([row] * per_kind, device=device)
                written = model.generate(
                    start,
                    attention_mask=torch.ones_like(start),
                    do_sample=True,
                    top_k=5,
                    top_p=1.0,
                    temperature=1.0,
                    repetition_penalty=1.0,
                    max_new_tokens=max(1, length - len(row)),
                    pad_token_id=tokens.pad_id,
                )
                texts = tokens.tokenizer.batch_decode(written, skip_special_tokens=True)
                templates += [text.strip() + ". {}" for text in texts]
    return templates


def sample_text_ids(
    model: PreTrainedModel, tokens: PromptTokenizer, count: int, seed: int
) -> Tensor:
    """Rows of text that the model writes itself, each begun with a random word.

    Each batch of rows has a seed of its own, so that processes can share them out.

    Args:
        model: A decoder-only model.
        tokens: Its tokenizer.
        count: Tokens wanted, rounded up to whole rows.
        seed: Seed of the samples.

    Returns:
        Token ids, [rows, 64].
    """
    return torch.cat(list(sample_rows(model, tokens, count, seed)))


def sample_rows(
    model: PreTrainedModel,
    tokens: PromptTokenizer,
    count: int,
    seed: int,
    processes: Processes | None = None,
) -> Iterator[Tensor]:
    """Batches of the rows of ``sample_text_ids``, those of this process's share.

    Args:
        model: A decoder-only model.
        tokens: Its tokenizer.
        count: Tokens wanted by all processes together, rounded up to whole rows.
        seed: Seed of the samples.
        processes: Those that share out the batches; this one alone if None.

    Yields:
        Token ids, [at most 64 rows, 64].
    """
    special = set(getattr(tokens.tokenizer, "all_special_ids", []))
    ordinary = torch.tensor([i for i in range(len(tokens.tokenizer)) if i not in special])
    device = next(model.parameters()).device
    n_rows = -(-count // ROW_LENGTH)
    for i in (processes or Processes()).share(-(-n_rows // BATCH_ROWS)):
        size = min(BATCH_ROWS, n_rows - i * BATCH_ROWS)
        with seeded(seed + i), torch.no_grad():
            begun = ordinary[torch.randint(len(ordinary), (size, 1))].to(device)
            written: Tensor = model.generate(
                begun,
                attention_mask=torch.ones_like(begun),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                repetition_penalty=1.0,
                max_new_tokens=ROW_LENGTH - 1,
                min_new_tokens=ROW_LENGTH - 1,
                pad_token_id=tokens.pad_id,
            )
        yield written
