# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""How well a model still reads ordinary prose: perplexity on a text it was not edited with."""

# Shapes: B rows, W tokens of a row, V vocabulary.

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from lightning_edit.core.batch import IGNORE_INDEX, PromptTokenizer, pad_rows
from lightning_edit.core.errors import EditError
from lightning_edit.core.plain_model import check_ids, check_tokens
from lightning_edit.passes.borrowing import borrowed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["perplexity", "read_prose"]

ROWS_AT_ONCE = 4  # their logits over the vocabulary are what takes the memory


def read_prose(path: str | Path | None = None) -> str:
    """The text of a file, or a page of everyday prose that comes with the package.

    Args:
        path: A UTF-8 text file; the packaged text when None.

    Raises:
        EditError: If there is no such file.

    Examples:
        >>> read_prose().startswith("The mill stood")
        True
    """
    if path is None:
        return (files("lightning_edit.evaluation") / "prose.txt").read_text(encoding="utf-8")
    if not Path(path).is_file():
        raise EditError(f"There is no text file `{path}` to measure perplexity on. Give another.")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EditError(f"`{path}` cannot be read as UTF-8 text ({error}). Give another.") from None


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokens: PromptTokenizer, text: str, *, window: int = 256
) -> float:
    """The exponential of the mean negative log-likelihood of a text's tokens.

    The text is cut into windows that are read apart, each after the token for the beginning where
    the model expects one. An encoder-decoder reads the first half of each window and is asked for
    the second.

    Args:
        model: A Hugging Face language model.
        tokens: Its tokenizer.
        text: The text.
        window: Tokens of a window; fewer where the model reads fewer.

    Returns:
        Perplexity of a token, at least 1.

    Raises:
        EditError: If the text is too short.

    Examples:
        >>> from lightning_edit.demos import tiny_model, tiny_tokenizer
        >>> value = perplexity(tiny_model(), PromptTokenizer(tiny_tokenizer()), "A short text.")
        >>> 300 < value < 600  # a random model of 424 tokens
        True
    """
    check_tokens(model, tokens)
    tokenizer = tokens.tokenizer
    ids = [int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    begin = []
    if tokenizer.bos_token_id is not None:
        begin = [i for i in tokenizer("a")["input_ids"][:1] if i == tokenizer.bos_token_id]
    check_ids(model, tokens, [ids])
    longest = getattr(model.config, "max_position_embeddings", None) or window
    width = max(2, min(window, longest) - len(begin))
    rows = [ids[start : start + width] for start in range(0, len(ids), width)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise EditError(
            f"Perplexity needs a text of two tokens or more, but got {len(ids)}. Give a longer one."
        )
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        if tokens.is_encoder_decoder:
            halves = [len(row) // 2 for row in part]
            inputs, mask = pad_rows([r[:h] for r, h in zip(part, halves, strict=True)], 0)
            labels, _ = pad_rows([r[h:] for r, h in zip(part, halves, strict=True)], IGNORE_INDEX)
            more: dict[str, object] = {"labels": labels.to(device)}
        else:
            inputs, mask = pad_rows([[*begin, *row] for row in part], tokens.pad_id)
            labels = inputs.masked_fill(mask == 0, IGNORE_INDEX)[:, 1:]
            more = {"use_cache": False}
        with borrowed(model):
            logits_BWV = model(
                input_ids=inputs.to(device), attention_mask=mask.to(device), **more
            ).logits[:, : labels.shape[1]]
        nll = cross_entropy(
            logits_BWV.flatten(0, 1).float(), labels.flatten().to(device), reduction="sum"
        )
        total += float(nll)
        count += int((labels != IGNORE_INDEX).sum())
    return math.exp(min(total / count, 700.0)) if math.isfinite(total) else math.inf
