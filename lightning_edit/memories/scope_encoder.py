# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Encoders that tell what a prompt is about, out of the tokens of a language model."""

# Shapes: B texts, T tokens, E width of the base's token embeddings, D width of an embedding.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_edit.core.batch import pad_rows
from lightning_edit.memories.text_encoder import check_pooling, load_encoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["FolderEncoder", "ScopeEncoder", "TokenEncoder"]

MAX_TOKENS = 512


class ScopeEncoder(nn.Module, ABC):
    """Gives texts, as the base tokenizes them, a place in space."""

    @abstractmethod
    def encode(self, base: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings of texts.

        Args:
            base: The language model.
            rows: Token ids of B texts.

        Returns:
            [B, D] float32, with gradients to the encoder.
        """


class TokenEncoder(ScopeEncoder):
    """A small transformer over the token embeddings of the base, which stay as they are.

    Args:
        base: The language model.
        width: D, and the width of the transformer.
        depth: Its layers.
        heads: Its attention heads.
        generator: Of the numbers that it begins with.
    """

    def __init__(
        self, base: PreTrainedModel, width: int, depth: int, heads: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=1,  # tokens come as vectors
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=MAX_TOKENS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            self.features = nn.Linear(base.get_input_embeddings().weight.shape[1], width)
            self.transformer = BertModel(config, add_pooling_layer=False).eval()
            self.head = nn.Linear(width, width)
        # The one word embedding there is is never looked up.
        self.transformer.embeddings.word_embeddings.weight.requires_grad_(False)

    @override
    def encode(self, base: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
        embeddings = base.get_input_embeddings()
        kept = [list(row)[-MAX_TOKENS:] for row in rows]
        ids, mask = (t.to(embeddings.weight.device) for t in pad_rows(kept, 0))
        with torch.no_grad():
            tokens = nn.functional.normalize(embeddings(ids).float(), dim=-1)
        scaled = tokens * tokens.shape[-1] ** 0.5  # entries of size one, whatever the model
        states = self.transformer(
            inputs_embeds=self.features(scaled), attention_mask=mask
        ).last_hidden_state
        shares = mask[..., None] / mask.sum(1)[:, None, None]
        pooled: Tensor = self.head((states.float() * shares).sum(1))
        return pooled


class FolderEncoder(ScopeEncoder):
    """A text encoder out of a folder, such as one that sentence-transformers saved.

    Tokens of the base are turned into text first, by the base's tokenizer, which is kept with the
    state of this module.

    Args:
        folder: As in ``load_encoder``.
        pooling: How it is expected to pool states.

    Raises:
        ArtifactError: If it pools them in another way.
        MissingDependencyError: If sentence-transformers is needed and not installed.
        ModelError: If there is no such encoder.
    """

    tokenizer: Tensor

    def __init__(self, folder: str, pooling: str) -> None:
        super().__init__()
        self._folder = folder
        self._encoder = load_encoder(folder)
        self.check_pooling(pooling)
        self.transformer = self._encoder.transformer
        self.head = self._encoder.head
        self.register_buffer("tokenizer", torch.zeros(0, dtype=torch.uint8))
        self._decoder: Tokenizer | None = None

    @property
    def pooling(self) -> str:
        """How the encoder pools states, which its weights do not tell."""
        return self._encoder.pooling

    def check_pooling(self, made_with: str) -> None:
        """Checks that networks or edits that were made before are of this pooling.

        Raises:
            ArtifactError: If they are not.
        """
        check_pooling(self._folder, self.pooling, made_with)

    def take_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Takes over the base's fast tokenizer, by which tokens become text."""
        text = tokenizer.backend_tokenizer.to_str()
        self.tokenizer = torch.tensor(list(text.encode()), dtype=torch.uint8)
        self._decoder = None

    @override
    def encode(self, base: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
        return self._encoder([self._text(row) for row in rows])

    def _text(self, row: Sequence[int]) -> str:
        if self._decoder is None:
            from tokenizers import Tokenizer

            self._decoder = Tokenizer.from_str(bytes(self.tokenizer.tolist()).decode())
        return str(self._decoder.decode(list(row), skip_special_tokens=True))

    @override
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        found = state_dict.get(f"{prefix}tokenizer")
        if found is not None:  # of any length
            self.tokenizer = torch.empty_like(found, device=self.tokenizer.device)
            self._decoder = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
