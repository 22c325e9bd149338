# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Texts that a model writes itself: contexts for prompts, and rows to take statistics from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.processes import Processes
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.decoding import sampling, write, written_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "BATCH_ROWS",
    "ROW_LENGTH",
    "sample_rows",
    "sample_templates",
    "sample_text_ids",
    "sampled_by",
    "seeded",
]

# Words that the sampled contexts begin with.
OPENINGS = ("The", "Therefore", "Because", "I", "You")
CONTEXT_LENGTHS = (5, 10)  # tokens, openings included
ROW_LENGTH = 64  # tokens of one row of text
BATCH_ROWS = 64  # rows run at once: about four thousand tokens
CONTEXTS = sampling(top_k=5)
ROWS = {**sampling(), "max_new_tokens": ROW_LENGTH - 1, "min_new_tokens": ROW_LENGTH - 1}


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
    with seeded(seed), torch.no_grad(), borrowed(model):
        for length in lengths:
            for row in rows:
                start = torch.tensor([row] * per_kind, device=device)
                settings = {**CONTEXTS, "max_new_tokens": max(1, length - len(row))}
                written = write(model, tokens, start, torch.ones_like(start), settings)
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
    ordinary = torch.tensor(_ordinary(model, tokens))
    device = next(model.parameters()).device
    n_rows = -(-count // ROW_LENGTH)
    for i in (processes or Processes()).share(-(-n_rows // BATCH_ROWS)):
        size = min(BATCH_ROWS, n_rows - i * BATCH_ROWS)
        with seeded(seed + i), torch.no_grad(), borrowed(model):
            begun = ordinary[torch.randint(len(ordinary), (size, 1))].to(device)
            written = write(model, tokens, begun, torch.ones_like(begun), ROWS)
        yield written


def sampled_by(model: PreTrainedModel, tokens: PromptTokenizer, count: int, seed: int) -> str:
    """A digest of all that decides what ``sample_rows`` gives, beside the model itself.

    Args:
        model: As in ``sample_rows``.
        tokens: As in ``sample_rows``.
        count: As in ``sample_rows``.
        seed: As in ``sample_rows``.
    """
    import transformers

    made = {
        "generation": written_by(model, tokens, ROWS).to_dict(),
        "transformers": transformers.__version__,  # whose defaults are what is not set
        "ordinary": _ordinary(model, tokens),
        "rows": [-(-count // ROW_LENGTH), BATCH_ROWS],
        "seed": seed,
    }
    text = json.dumps(made, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _ordinary(model: PreTrainedModel, tokens: PromptTokenizer) -> list[int]:
    """Tokens that a row may begin with: all that the model knows, but for special ones."""
    special = set(getattr(tokens.tokenizer, "all_special_ids", []))
    known = min(len(tokens.tokenizer), len(model.get_input_embeddings().weight))
    return [i for i in range(known) if i not in special]
