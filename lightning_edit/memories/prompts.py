# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits as text before the prompt: which of them, and in which words."""

# Shapes: N entries, B prompts, D width of an embedding.

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import EditError
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.core.spacing import space_between
from lightning_edit.memories.encoder import encode_by_folder, encode_by_model
from lightning_edit.memories.text_encoder import PLAIN_POOLING, pooling_setting

__all__ = ["PromptMemory", "demonstration", "statement"]


def statement(prompt: str, answer: str, glued: bool | None = None) -> str:
    """A prompt and its answer as running text, without a space between them if ``glued``.

    Examples:
        >>> statement("The capital of France is", "Rome")
        'The capital of France is Rome'
    """
    return prompt + space_between(prompt, answer, glued) + answer


def demonstration(fact: str, prompt: str, answer: str = "", glued: bool | None = None) -> str:
    """A new fact and a prompt that is asked in its light, as IKE words them.

    Args:
        fact: The fact as running text.
        prompt: What is asked.
        answer: Its answer, in a demonstration; nothing where the model is to go on.
        glued: Whether the answer follows without a space; as running text has it if None.

    Examples:
        >>> print(demonstration("The capital of France is Rome", "France's capital is"))
        New Fact: The capital of France is Rome
        Prompt: France's capital is
    """
    asked = statement(prompt, answer, glued) + "\n\n" if answer else prompt
    return f"New Fact: {fact}\nPrompt: {asked}"


class PromptMemory(EditMemory):
    """Facts that are told to the model before a prompt, found by the likeness of their prompts.

    The model itself is not touched: ``rewrite`` gives the text to ask it, or any other that
    serves it. The metrics and texts of this package ask so of themselves. A prompt that is like
    none of the facts is left as it is.

    Its buffer is ``embeddings`` [N, D], float32 and of length one.

    Args:
        encoder: Folder of a text encoder, used as it asks for; mean hidden states of the language
            model's first sixth of blocks if None.
        facts: Facts that are told at most, the most fitting last.
        threshold: Cosine that a fact's prompt must exceed to be told.
        pooling: How the encoder pools states.
    """

    fields: ClassVar[tuple[str, ...]] = ("embeddings",)
    embeddings: Tensor

    def __init__(
        self,
        encoder: str | None = None,
        facts: int = 1,
        threshold: float = -1.0,
        pooling: str = PLAIN_POOLING,
    ) -> None:
        super().__init__(
            encoder=encoder, facts=facts, threshold=threshold, **pooling_setting(pooling)
        )
        self.pooling = pooling

    @override
    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        """None: the prompts change, and not what becomes of them."""
        return []

    def encode(self, texts: Sequence[str], tokens: PromptTokenizer) -> Tensor:
        """Embeddings of texts, [B, D] float32."""
        folder: str | None = self.settings["encoder"]
        if folder is not None:
            return encode_by_folder(folder, self.pooling, texts)
        model = self._model() if self._model is not None else None
        if model is None:
            raise EditError("The memory belongs to no model yet. Call `memory.attach_(model)`.")
        return encode_by_model(model, tokens, texts)

    @override
    def rewrite(self, prompts: Sequence[str], tokens: PromptTokenizer) -> list[str]:
        if self.is_off or not len(self) or not prompts:
            return list(prompts)
        embeddings = self.encode(prompts, tokens).to(self.embeddings.device)
        cosines, indices = (embeddings @ self.embeddings.T).topk(
            min(self.settings["facts"], len(self)), dim=1
        )
        entries = list(self._records.values())
        asked: list[str] = []
        for prompt, near, found in zip(prompts, cosines.tolist(), indices.tolist(), strict=True):
            told = [
                entries[i].notes
                for cosine, i in zip(near, found, strict=True)
                if cosine > self.settings["threshold"]
            ]
            asked.append(self._tell(told[::-1], prompt) if told else prompt)
        return asked

    def _tell(self, notes: Sequence[dict[str, str]], prompt: str) -> str:
        """The demonstrations of the last fact, all facts, and the prompt."""
        *others, last = notes
        facts = "".join(f"New Fact: {other['fact']}\n" for other in others)
        return last["context"] + facts + demonstration(last["fact"], prompt)
