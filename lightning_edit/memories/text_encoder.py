# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Text encoders out of folders, with the pooling and normalization that the folder asks for."""

# Shapes: B texts, T tokens, D width of an embedding.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_edit.core.errors import ArtifactError, MissingDependencyError, ModelError

__all__ = [
    "PLAIN_POOLING",
    "TextEncoder",
    "check_pooling",
    "folder_pooling",
    "load_encoder",
    "mean_states",
    "pooling_setting",
]

#: What a folder of a plain model is used with: the mean over the tokens, of length one.
PLAIN_POOLING = "mean+normalize"


def mean_states(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the tokens' hidden states, scaled to length one.

    Args:
        states: [B, T, D].
        mask: 1 on tokens, 0 on padding, [B, T].

    Returns:
        [B, D] float32.

    Examples:
        >>> mean_states(torch.tensor([[[3.0, 4.0], [9.0, 9.0]]]), torch.tensor([[1, 0]]))
        tensor([[0.6000, 0.8000]])
    """
    kept = mask[..., None].float()
    means = (states.float() * kept).sum(1) / kept.sum(1)
    return torch.nn.functional.normalize(means, dim=1)


class TextEncoder(ABC):
    """A model out of a folder that gives texts a place in space.

    Args:
        transformer: The model that reads tokens.
        head: What comes after it and may have weights of its own.
        pooling: How the states of its tokens become one vector, such as ``cls+normalize``.
    """

    def __init__(self, transformer: nn.Module, head: nn.Module, pooling: str) -> None:
        self.transformer = transformer
        self.head = head
        self.pooling = pooling

    @abstractmethod
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts; what is too long for the encoder is cut.

        Args:
            texts: B texts.

        Returns:
            [B, D] float32 on the device of the model, with gradients to its weights.
        """


class _PlainEncoder(TextEncoder):
    """A model and its tokenizer, read by transformers."""

    def __init__(self, tokenizer: Any, model: nn.Module) -> None:
        super().__init__(model, nn.Identity(), PLAIN_POOLING)
        self._tokenizer = tokenizer

    @override
    def __call__(self, texts: Sequence[str]) -> Tensor:
        given = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        given = given.to(next(self.transformer.parameters()).device)
        return mean_states(self.transformer(**given).last_hidden_state, given["attention_mask"])


class _SentenceEncoder(TextEncoder):
    """A model of sentence-transformers with all of its modules."""

    def __init__(self, model: Any) -> None:
        first, *others = model
        self._model = model
        self._prompt = model.prompts.get(model.default_prompt_name)
        names = [_described(module) for module in others]
        names += [f"prompt {self._prompt!r}"] if self._prompt else []
        names += [f"first {model.truncate_dim}"] if model.truncate_dim else []
        # The transformer alone, so that its weights have the names that they have without a head.
        transformer = getattr(first, "model", first)
        super().__init__(transformer, nn.ModuleList(others), "+".join(names))

    @override
    def __call__(self, texts: Sequence[str]) -> Tensor:
        # What its `encode` does, which gives no gradients.
        features = self._model.preprocess(list(texts), prompt=self._prompt)
        given = {
            name: value.to(self._model.device) if isinstance(value, Tensor) else value
            for name, value in features.items()
        }
        found: Tensor = self._model(given)["sentence_embedding"]
        return found[:, : self._model.truncate_dim].float()


def _described(module: nn.Module) -> str:
    """Modes of a pooling, such as ``cls``; of any other module its name, such as ``dense``."""
    modes: str | Sequence[str] | None = getattr(module, "pooling_mode", None)
    if modes is None:
        return type(module).__name__.lower()
    return modes if isinstance(modes, str) else "-".join(modes)


def load_encoder(folder: str) -> TextEncoder:
    """Reads a text encoder.

    What sentence-transformers saved (it has a ``modules.json``) is read by that package and used as
    it says there. Any other is read by transformers, and used with the mean over the tokens'
    states, of length one.

    Args:
        folder: Folder of a model and its tokenizer, or its hub id. Of a folder, nothing is asked
            of the hub.

    Returns:
        The encoder, in eval mode, on the CPU.

    Raises:
        MissingDependencyError: If sentence-transformers is needed and not installed.
        ModelError: If there is no such encoder.
    """
    from transformers.utils import cached_file

    try:
        modules = cached_file(folder, "modules.json", _raise_exceptions_for_missing_entries=False)
        return _load_plain(folder) if modules is None else _load_sentence_model(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`encoder={folder!r}` cannot be loaded as a text encoder ({error}). Give a folder "
            "with a model and its tokenizer, or null for the editor's own."
        ) from None


def _load_plain(folder: str) -> TextEncoder:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModel.from_pretrained(folder, trust_remote_code=False)
    return _PlainEncoder(tokenizer, model.eval())


def _load_sentence_model(folder: str) -> TextEncoder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise MissingDependencyError(
            "sentence-transformers", "encoders", f"The text encoder `{folder}`"
        ) from None
    model = SentenceTransformer(
        folder,
        device="cpu",
        trust_remote_code=False,
        local_files_only=Path(folder).is_dir(),
    )
    return _SentenceEncoder(model.eval())


def folder_pooling(folder: str | None) -> str:
    """How an encoder pools states, for a memory to keep with what it embeds.

    Args:
        folder: As in ``load_encoder``; None for no encoder of somebody else.

    Raises:
        MissingDependencyError: If sentence-transformers is needed and not installed.
        ModelError: If there is no such encoder.
    """
    return PLAIN_POOLING if folder is None else load_encoder(folder).pooling


def pooling_setting(pooling: str) -> dict[str, str]:
    """What a memory notes of a pooling: nothing of the plain one, which older edits do not name.

    Examples:
        >>> pooling_setting("cls"), pooling_setting(PLAIN_POOLING)
        ({'pooling': 'cls'}, {})
    """
    return {} if pooling == PLAIN_POOLING else {"pooling": pooling}


def check_pooling(folder: str, pooling: str, made_with: str) -> None:
    """Checks that an encoder pools states as when networks were trained or edits made.

    Args:
        folder: Of the encoder.
        pooling: How it pools them.
        made_with: How it did then.

    Raises:
        ArtifactError: If it does not.
    """
    if pooling == made_with:
        return
    advice = "Put the encoder back that they were made with, or train and edit anew."
    if made_with == PLAIN_POOLING:  # of every folder, before its own pooling was asked for
        advice = "Train and edit anew, or take its `modules.json` away: without one it is the mean."
    raise ArtifactError(
        f"These networks or edits were made with embeddings by {made_with}, but "
        f"`encoder={folder!r}` asks for {pooling}. {advice}"
    )
