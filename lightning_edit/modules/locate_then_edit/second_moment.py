# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Second moments of a model's keys, from text or from what the model itself writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import ModelError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest
from lightning_edit.core.sharding import ends_whole, plain
from lightning_edit.core.tensor_files import read_sealed, write_sealed
from lightning_edit.functional.moments import regularize, second_moment_update, shrink_to_pool
from lightning_edit.passes.block_recorder import StopPass
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.hooks import hooked
from lightning_edit.passes.sampling import BATCH_ROWS, ROW_LENGTH, sample_rows, sampled_by
from lightning_edit.passes.transfers import sent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "data_module_ids",
    "second_moments",
    "text_file_ids",
]


def second_moments(
    tree: ModelTree,
    tokens: PromptTokenizer,
    layers: Sequence[int],
    *,
    model_hash: str,
    text: str | LightningDataModule | None = None,
    tokens_per_dimension: int = 4,
    ridge: float = 1e-3,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    processes: Processes | None = None,
) -> dict[int, Tensor]:
    """Second moments of the inputs of MLP output projections, all layers in one pass.

    Of a mixture of experts each has its own, of the keys of the tokens that are sent to it, drawn
    towards that of all experts together where these are few.

    Args:
        tree: A decoder-only model, unedited.
        tokens: Its tokenizer.
        layers: Layers that are needed; the pass ends after the last of them.
        model_hash: Weight hash of the model. Results are cached under it, the model's
            configuration, and all that the rows depend on.
        text: Path of a text file, or a data module; see ``data_module_ids``. Without it the
            model samples its own text.
        tokens_per_dimension: Tokens read, as a multiple of the key's dimensions. A small multiple
            suffices (arXiv 2506.04226).
        ridge: Share of the mean eigenvalue that is added to the diagonal.
        seed: Seed of the samples.
        cache_dir: Folder to keep results in; nothing is kept when None.
        processes: Those that all call, and share out the rows; each gets the moments of all rows.

    Returns:
        Layer to C = E[k kᵀ], [M, M] float32, or those of its E experts, [E, M, M].

    Raises:
        ModelError: If the text cannot be read or is shorter than one row.
    """
    layers = sorted({tree.index(layer) for layer in layers})
    dimension = max(tree.mlp_site(layer).moment_shape[-1] for layer in layers)
    wanted = tokens_per_dimension * dimension
    rows = None
    if text is None:
        source = f"samples-{sampled_by(tree.model, tokens, wanted, seed)}"
    else:
        if isinstance(text, str):
            rows = text_file_ids(tokens, text, wanted)
        else:
            rows = data_module_ids(tokens, text, wanted)
        source = f"text-{hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]}"
    source = f"{_config_digest(tree.model)}-{source}"
    files = {
        layer: Path(cache_dir)
        / "second_moments"
        / f"{model_hash[:20]}-{layer}-{source}.safetensors"
        for layer in layers
        if cache_dir is not None and model_hash
    }
    kept = {layer: _read(file) for layer, file in files.items() if file.is_file()}
    sums = {layer: found for layer, found in kept.items() if found is not None}
    one = processes or Processes()
    # A process may lack a file that others have.
    missing = [layer for layer in layers if not one.agree(layer in sums)]
    if missing:
        if rows is None:
            rank_zero_info(f"Sampling {wanted} tokens from the model for its second moments …")
            batches = list(sample_rows(tree.model, tokens, wanted, seed, one))
        else:
            parts = torch.split(rows, BATCH_ROWS)
            batches = [parts[i] for i in one.share(len(parts))]
        sums |= _accumulate(tree, missing, batches, one)
        for layer in missing:
            if layer in files:
                _write(files[layer], *sums[layer])
    return {layer: _mean(*sums[layer], ridge) for layer in layers}


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
    return _rows_of(tokens, [text], count, f"`{path}`")


def data_module_ids(tokens: PromptTokenizer, data: LightningDataModule, count: int) -> Tensor:
    """Rows of tokens from the beginning of a data module's training data.

    Its batches may be texts, edit requests (read with their old answers), or tokens under
    ``input_ids``, with ``attention_mask`` where they are padded.

    Args:
        tokens: The model's tokenizer.
        data: The data module; it is prepared and set up for ``fit``.
        count: Tokens wanted, rounded up to whole rows; fewer where there are fewer.

    Returns:
        Token ids, [rows, 64].

    Raises:
        ModelError: If a batch holds something else, or all of it is shorter than one row.

    Examples:
        >>> from lightning_edit.data import EditDataModule
        >>> from lightning_edit.demos import tiny_requests, tiny_tokenizer
        >>> data = EditDataModule(requests=tiny_requests(24))
        >>> data_module_ids(PromptTokenizer(tiny_tokenizer()), data, 100).shape
        torch.Size([2, 64])
    """
    data.prepare_data()
    data.setup("fit")
    name = type(data).__name__

    def texts_of(batch: object) -> Iterator[str | list[int]]:
        if isinstance(batch, str):
            yield batch
        elif isinstance(batch, EditRequest):
            answer = batch.target_old or ""
            space = tokens.leading_space(batch.prompt, answer, batch.glued) if answer else ""
            yield f"{batch.prompt}{space}{answer}."
        elif isinstance(batch, Mapping) and "input_ids" in batch:
            masks = batch.get("attention_mask")
            for i, row in enumerate(batch["input_ids"]):
                kept = row if masks is None else row[masks[i].bool()]
                yield [int(token) for token in kept]
        elif isinstance(batch, Sequence):
            yield from chain.from_iterable(map(texts_of, batch))
        else:
            raise ModelError(
                f"`second_moment_text`: a batch of {name} is a {type(batch).__name__}. Texts, edit "
                "requests, or a mapping with `input_ids` were expected."
            )

    batches = data.train_dataloader()
    return _rows_of(tokens, chain.from_iterable(map(texts_of, batches)), count, name)


def _rows_of(
    tokens: PromptTokenizer, texts: Iterable[str | list[int]], count: int, name: str
) -> Tensor:
    """Whole rows of the first tokens of some texts, put after one another."""
    wanted = -(-count // ROW_LENGTH) * ROW_LENGTH
    ids: list[int] = []
    for text in texts:
        if isinstance(text, str):
            ids += tokens.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids += text
        if len(ids) >= wanted:
            break
    n_rows = min(wanted, len(ids)) // ROW_LENGTH
    if n_rows < 1:
        raise ModelError(
            f"`second_moment_text`: {name} has {len(ids)} tokens, fewer than {ROW_LENGTH}. "
            "Give a longer text, or none to let the model write its own."
        )
    return torch.tensor(ids[: n_rows * ROW_LENGTH]).reshape(n_rows, ROW_LENGTH)


def _accumulate(
    tree: ModelTree, layers: Sequence[int], batches: Sequence[Tensor], processes: Processes
) -> dict[int, tuple[Tensor, Tensor]]:
    """Sums of outer products and the number of keys, over all processes; or of each expert."""
    device = next(tree.blocks[0].parameters()).device
    sites = {layer: tree.mlp_site(layer) for layer in layers}
    totals = {
        layer: torch.zeros(site.moment_shape, dtype=torch.float64, device=device)
        for layer, site in sites.items()
    }
    counts = {
        layer: torch.zeros(site.moment_shape[:-2], dtype=torch.int64, device=device)
        for layer, site in sites.items()
    }

    def adder(layer: int) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...], __: object) -> None:
            states = plain(args[0])
            samples = sites[layer].samples(tree.model, states.reshape(-1, states.shape[-1]))
            for place, keys in samples:
                second_moment_update(totals[layer][place], keys)
                counts[layer][place] += len(keys)
            if layer == layers[-1]:
                raise StopPass

        return add

    model: PreTrainedModel = tree.model
    before = {site.module(tree.model): adder(layer) for layer, site in sites.items()}
    with torch.no_grad(), borrowed(model), ends_whole(model), hooked(before=before):
        for batch in batches:
            with suppress(StopPass):
                model.base_model(input_ids=sent(batch, device), use_cache=False)
    return {
        layer: (processes.total(totals[layer]).cpu(), processes.total(counts[layer]).cpu())
        for layer in layers
    }


def _mean(total: Tensor, count: Tensor, ridge: float) -> Tensor:
    """C of sums and numbers of keys; each expert's leans on that of all, the more the fewer it had.

    The pooled moment counts for as many keys as a key has dimensions.
    """
    if count.ndim:
        total, count = shrink_to_pool(total, count, total.shape[-1])
    return regularize(total, count, ridge)


def _config_digest(model: PreTrainedModel) -> str:
    """A digest of what beside its weights makes a model say what it says."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "architectures", "dtype", "transformers_version"):
        config.pop(name, None)  # where it comes from, or told by its weights
    text = json.dumps([type(model).__name__, config], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _read(file: Path) -> tuple[Tensor, Tensor] | None:
    """What a file keeps; None if it is damaged or without a checksum, so that it is made anew."""
    try:
        tensors, _ = read_sealed(file, is_needed=True)
        return tensors["total"], tensors["count"]
    except (OSError, ValueError, KeyError):
        return None


def _write(file: Path, total: Tensor, count: Tensor) -> None:
    write_sealed(file, {"total": total.contiguous(), "count": count}, {})
