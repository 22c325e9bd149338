# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Second moments of a model's keys, from text or from what the model itself writes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import ModelError
from lightning_edit.core.locator import ModelTree
from lightning_edit.functional.moments import regularize, second_moment_update

__all__ = ["sample_text_ids", "second_moments", "seeded", "text_file_ids"]

ROW_LENGTH = 64  # tokens of one row of text
BATCH_ROWS = 64  # rows run at once: about four thousand tokens


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside a ``with`` block come from the seed, and leave the caller's draws alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def second_moments(
    tree: ModelTree,
    tokens: PromptTokenizer,
    layers: Sequence[int],
    *,
    model_hash: str,
    text: str | None = None,
    tokens_per_dimension: int = 4,
    ridge: float = 1e-3,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> dict[int, Tensor]:
    """Second moments of the inputs of MLP output projections, all layers in one pass.

    Args:
        tree: A decoder-only model, unedited.
        tokens: Its tokenizer.
        layers: Layers that are needed; the pass ends after the last of them.
        model_hash: Weight hash of the model, under which results are cached.
        text: Path of a text file; without it the model samples its own text.
        tokens_per_dimension: Tokens read, as a multiple of the key's dimensions. A small multiple
            suffices (arXiv 2506.04226).
        ridge: Share of the mean eigenvalue that is added to the diagonal.
        seed: Seed of the samples.
        cache_dir: Folder to keep results in; nothing is kept when None.

    Returns:
        Layer to C = E[k kᵀ], [M, M] float32.

    Raises:
        ModelError: If the text file does not exist or is shorter than one row.
    """
    layers = sorted({tree.index(layer) for layer in layers})
    source = _source_name(text, tokens_per_dimension, seed)
    files = {
        layer: Path(cache_dir)
        / "second_moments"
        / f"{model_hash[:20]}-{layer}-{source}.safetensors"
        for layer in layers
        if cache_dir is not None and model_hash
    }
    kept = {layer: _read(file) for layer, file in files.items() if file.is_file()}
    sums = {layer: found for layer, found in kept.items() if found is not None}
    missing = [layer for layer in layers if layer not in sums]
    if missing:
        dimension = max(tree.mlp_out(layer).in_features for layer in missing)
        wanted = tokens_per_dimension * dimension
        if text is None:
            rank_zero_info(f"Sampling {wanted} tokens from the model for its second moments …")
            rows = sample_text_ids(tree.model, tokens, wanted, seed)
        else:
            rows = text_file_ids(tokens, text, wanted)
        sums |= _accumulate(tree, missing, rows)
        for layer in missing:
            if layer in files:
                _write(files[layer], *sums[layer])
    return {layer: regularize(sums[layer][0], sums[layer][1], ridge) for layer in layers}


def sample_text_ids(model: Any, tokens: PromptTokenizer, count: int, seed: int) -> Tensor:
    """Rows of text that the model writes itself, each begun with a random word.

    Args:
        model: A decoder-only model.
        tokens: Its tokenizer.
        count: Tokens wanted, rounded up to whole rows.
        seed: Seed of the samples.

    Returns:
        Token ids, [rows, 64].
    """
    special = set(getattr(tokens.tokenizer, "all_special_ids", []))
    ordinary = torch.tensor([i for i in range(len(tokens.tokenizer)) if i not in special])
    device = next(model.parameters()).device
    n_rows = -(-count // ROW_LENGTH)
    rows = []
    with seeded(seed), torch.no_grad():
        for start in range(0, n_rows, BATCH_ROWS):
            size = min(BATCH_ROWS, n_rows - start)
            first = ordinary[torch.randint(len(ordinary), (size, 1))].to(device)
            written = model.generate(
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                repetition_penalty=1.0,
                max_new_tokens=ROW_LENGTH - 1,
                min_new_tokens=ROW_LENGTH - 1,
                pad_token_id=tokens.pad_id,
            )
            rows.append(written)
    return torch.cat(rows)


def text_file_ids(tokens: PromptTokenizer, path: str | Path, count: int) -> Tensor:
    """Rows of tokens from the beginning of a text file.

    Args:
        tokens: The model's tokenizer.
        path: A UTF-8 text file.
        count: Tokens wanted, rounded up to whole rows; fewer where the file is shorter.

    Returns:
        Token ids, [rows, 64].

    Raises:
        ModelError: If there is no such file, or it is shorter than one row.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"`second_moment_text`: there is no file `{path}`.")
    # A token is seldom longer than eight characters.
    with file.open(encoding="utf-8") as stream:
        text = stream.read(count * 8 + ROW_LENGTH * 8)
    ids = tokens.tokenizer(text, add_special_tokens=False)["input_ids"]
    n_rows = min(-(-count // ROW_LENGTH), len(ids) // ROW_LENGTH)
    if n_rows < 1:
        raise ModelError(
            f"`second_moment_text`: `{path}` has {len(ids)} tokens, fewer than {ROW_LENGTH}. "
            "Give a longer text, or none to let the model write its own."
        )
    return torch.tensor(ids[: n_rows * ROW_LENGTH]).reshape(n_rows, ROW_LENGTH)


class _Stop(Exception):  # noqa: N818  # control flow, not an error
    """Ends a forward pass after the last layer that is needed."""


def _accumulate(
    tree: ModelTree, layers: Sequence[int], rows: Tensor
) -> dict[int, tuple[Tensor, int]]:
    device = next(tree.blocks[0].parameters()).device
    totals = {}
    hooks = []
    for layer in layers:
        site = tree.mlp_out(layer)
        total = torch.zeros(site.in_features, site.in_features, dtype=torch.float64, device=device)
        totals[layer] = total

        def add(_: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> None:
            second_moment_update(totals[layer], args[0].reshape(-1, args[0].shape[-1]))
            if layer == layers[-1]:
                raise _Stop

        hooks.append(site.module(tree.model).register_forward_pre_hook(add))
    model: Any = tree.model
    try:
        with torch.no_grad():
            for batch in torch.split(rows, BATCH_ROWS):
                try:
                    model.base_model(input_ids=batch.to(device), use_cache=False)
                except _Stop:
                    continue
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: (totals[layer].cpu(), rows.numel()) for layer in layers}


def _source_name(text: str | None, tokens_per_dimension: int, seed: int) -> str:
    if text is None:
        return f"samples-{tokens_per_dimension}-{seed}"
    file = Path(text)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else "missing"
    return f"{digest}-{tokens_per_dimension}"


def _read(file: Path) -> tuple[Tensor, int] | None:
    """What a file keeps; None if it is damaged, so that it is written again."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
        return tensors["total"], int(tensors["count"])
    except (SafetensorError, KeyError):
        return None


def _write(file: Path, total: Tensor, count: int) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent)
    os.close(handle)
    save_file({"total": total.contiguous(), "count": torch.tensor(count)}, temporary)
    os.replace(temporary, file)
