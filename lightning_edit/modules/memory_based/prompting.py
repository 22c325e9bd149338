# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What editors have in common that tell the model its edits in the prompt."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.request import EditRequest
from lightning_edit.core.side_memory import MemoryEntry
from lightning_edit.memories.prompts import PromptMemory, demonstration, statement
from lightning_edit.modules.memory_based.base import MemoryModule
from lightning_edit.passes.target_loss import target_probabilities

__all__ = ["PromptModule"]


class PromptModule(MemoryModule):
    """Base of in-context editors: an edit is a fact, and what is told with it.

    A subclass writes ``contexts``.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        encoder: Folder of a text encoder by which facts are found, such as one that
            sentence-transformers saved; mean hidden states of the language model's first sixth of
            blocks if None, which go more by wording.
        threshold: Cosine between a prompt and that of a fact from which on the fact is told.
        max_entries: Entries that the memory may hold; any number if None.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].
    """

    #: Facts that a prompt is told at most, the most fitting last.
    facts: int = 1

    def __init__(
        self,
        model: str = "smollm2",
        encoder: str | None = None,
        threshold: float = -1.0,
        max_entries: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, max_entries=max_entries, **kwargs)
        if not -1 <= threshold < 1:
            raise ValueError(
                f"`threshold` is expected to be a cosine from -1 to below 1, but got {threshold}."
            )
        self.encoder = encoder
        self.threshold = threshold

    @abstractmethod
    def contexts(self, requests: Sequence[EditRequest]) -> list[str]:
        """What is told before the fact of each request, such as demonstrations."""

    @property
    def prompts(self) -> PromptMemory:
        """The memory of the model."""
        return cast(PromptMemory, self.memory)

    @override
    def build_memory(self, tree: ModelTree) -> PromptMemory:
        return PromptMemory(self.encoder, self.facts, self.threshold)

    @override
    def compute_edit(self, batch: EditBatch) -> MemoryWrite:
        requests = batch.requests
        entries = self.entries_without([request.id for request in requests])
        with self.memory.off(), torch.no_grad():
            embeddings = self.prompts.encode([request.prompt for request in requests], self.tokens)
            contexts = self.contexts(requests)
            facts = [statement(request.prompt, request.target_new) for request in requests]
            for request, context, fact, embedding in zip(
                requests, contexts, facts, embeddings, strict=True
            ):
                kept = {"prompt": request.prompt, "target": request.target_new}
                notes = {"context": context, "fact": fact}
                name = self.entry_id(request.id, entries)
                entries[name] = MemoryEntry({"embeddings": embedding}, {request.id: kept}, notes)
            edit = self.memory_write(entries)
            asked = [
                context + demonstration(fact, request.prompt)
                for request, context, fact in zip(requests, contexts, facts, strict=True)
            ]
            told = EditBatch.from_ids(
                [self.tokens.prompt(text) for text in asked],
                [self.tokens.target(r.prompt, r.target_new) for r in requests],
                self.tokens,
                requests,
            )
            probabilities = target_probabilities(self.tree, told.to(batch.input_ids.device))
        edit.details["requests"] = [
            {
                "id": request.id,
                "loss": -math.log(max(p, 1e-38)),
                "steps": 0,
                "p_target": p,
                "norm": float(torch.linalg.vector_norm(embedding)),
                "prompt_tokens": int(length),
            }
            for request, p, embedding, length in zip(
                requests, probabilities, embeddings, told.prompt_lengths, strict=True
            )
        ]
        return edit
