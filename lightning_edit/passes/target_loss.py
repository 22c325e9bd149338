# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The loss of target tokens, with logits computed only where it reads them."""

# Shapes: B rows, T positions, N target tokens of all rows, D hidden, V vocabulary.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_edit.core.batch import IGNORE_INDEX, EditBatch
from lightning_edit.core.locator import ModelTree
from lightning_edit.passes.decoding import decoder_inputs
from lightning_edit.passes.hooks import hooked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Objective",
    "all_places",
    "place_logits",
    "row_means",
    "target_logits",
    "target_nll",
    "target_places",
]

MAX_ROWS = 64  # rows whose logits are held at once

Objective = Literal["target_new", "prompt_last"]


def target_nll(tree: ModelTree, batch: EditBatch, objective: Objective = "target_new") -> Tensor:
    """Negative log-likelihood of every target token, in the order of the batch's labels.

    Args:
        tree: A decoder-only or encoder-decoder model.
        batch: Prompts and targets.
        objective: ``target_new`` reads each token after those before it. ``prompt_last`` reads
            all of them right after the prompt, as EasyEdit's FT-L does: wrong for targets of more
            than one token.

    Returns:
        NLL in nats, [N] float32.

    Raises:
        ModelError: If it is not known what an encoder-decoder model's decoder begins with.

    Examples:
        >>> from lightning_edit.core.batch import PromptTokenizer
        >>> from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer
        >>> tokens = PromptTokenizer(tiny_tokenizer())
        >>> batch = EditBatch.from_requests(tiny_requests(2), tokens)
        >>> nll = target_nll(ModelTree.of(tiny_model()), batch)
        >>> nll.shape == batch.labels[batch.labels != -100].shape
        True
    """
    logits, targets = target_logits(tree, batch, objective)
    return cross_entropy(logits, targets, reduction="none")


def target_logits(
    tree: ModelTree, batch: EditBatch, objective: Objective = "target_new"
) -> tuple[Tensor, Tensor]:
    """Logits at the place of every target token, in the order of the batch's labels.

    Args:
        tree: A decoder-only or encoder-decoder model.
        batch: Prompts and targets.
        objective: As for ``target_nll``.

    Returns:
        Logits, [N, V] float32, and the targets, [N] int64.

    Raises:
        ModelError: If it is not known what an encoder-decoder model's decoder begins with.
    """
    rows, columns = torch.nonzero(batch.labels != IGNORE_INDEX, as_tuple=True)
    where = target_places(tree, batch)
    if objective == "prompt_last":
        first = batch.prompt_lengths - 1
        if tree.is_encoder_decoder:
            first = torch.zeros_like(first)
        where = (torch.arange(len(batch), device=first.device), first)
    logits = place_logits(tree, batch, where)
    if objective == "prompt_last":
        logits = logits[rows]
    return logits, batch.labels[rows, columns]


def target_places(tree: ModelTree, batch: EditBatch) -> tuple[Tensor, Tensor]:
    """Rows and positions at which the target tokens are predicted, in the order of the labels.

    Args:
        tree: A decoder-only or encoder-decoder model.
        batch: Prompts and targets.

    Returns:
        Two int64 tensors, [N].
    """
    rows, columns = torch.nonzero(batch.labels != IGNORE_INDEX, as_tuple=True)
    return rows, columns if tree.is_encoder_decoder else columns - 1


def all_places(tree: ModelTree, batch: EditBatch) -> tuple[Tensor, Tensor]:
    """Rows and positions of all tokens that a decoder reads: prompts count, padding does not.

    Args:
        tree: A decoder-only or encoder-decoder model; of the latter the decoder's tokens count.
        batch: Prompts and targets.

    Returns:
        Two int64 tensors, [N].
    """
    mask = batch.labels != IGNORE_INDEX if tree.is_encoder_decoder else batch.attention_mask
    rows, columns = torch.nonzero(mask, as_tuple=True)
    return rows, columns


def place_logits(tree: ModelTree, batch: EditBatch, where: tuple[Tensor, Tensor]) -> Tensor:
    """Logits at some places of a batch, and at these alone.

    Args:
        tree: A decoder-only or encoder-decoder model.
        batch: Prompts and targets; the model reads both.
        where: Rows and positions (of the decoder), [N] each.

    Returns:
        Logits, [N, V] float32.

    Raises:
        ModelError: If it is not known what an encoder-decoder model's decoder begins with.
    """
    # A part of a batch may be padded too far, and what no place can see need not be read.
    width = int(batch.attention_mask.sum(1).max())
    last = int(where[1].max()) + 1
    model: PreTrainedModel = tree.model
    inputs: dict[str, Tensor] = {}
    if tree.is_encoder_decoder:
        longest = int(torch.nonzero(batch.labels != IGNORE_INDEX)[:, 1].max()) + 1
        inputs = {"decoder_input_ids": decoder_inputs(model, batch.labels[:, :longest])}
    else:
        width = min(width, last)
    with _only_at(tree.lm_head, *where):
        logits = model(
            input_ids=batch.input_ids[:, :width],
            attention_mask=batch.attention_mask[:, :width],
            use_cache=False,
            **inputs,
        ).logits
    found: Tensor = logits[0] if tree.lm_head is not None else logits[where]
    return found.float()


def row_means(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of each row's target tokens.

    Args:
        values: A value of each target token, as ``target_nll`` returns them, [N].
        labels: Targets in their places and -100 elsewhere, [B, T].

    Returns:
        Means, [B].
    """
    mask = labels != IGNORE_INDEX
    sums = torch.zeros(len(labels), device=values.device, dtype=values.dtype)
    sums = sums.index_add(0, torch.nonzero(mask)[:, 0], values)
    return sums / mask.sum(1)


@contextmanager
def _only_at(head: nn.Module | None, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Context manager: the head gets these positions only, [1, N, D].

    The vocabulary is most of a short pass.
    """
    if head is None:
        yield
        return

    def select(
        _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[Tensor, ...], dict[str, object]]:
        return (args[0][rows, columns][None], *args[1:]), kwargs

    with hooked(before={head: select}):
        yield
