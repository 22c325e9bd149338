# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits that are told to the model in the prompt: a fact, and what is told with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.request import EditRequest
from lightning_edit.core.side_memory import MemoryEntry
from lightning_edit.memories.prompts import PromptMemory, demonstration, statement
from lightning_edit.modules.memory_based.base import MemoryModule

__all__ = ["check_threshold", "prompts_of", "tell"]


def check_threshold(threshold: float) -> None:
    """Checks the cosine from which on a fact is told.

    Raises:
        ValueError: If it is none, or always exceeded by none.
    """
    if not -1 <= threshold < 1:
        raise ValueError(
            f"`threshold` is expected to be a cosine from -1 to below 1, but got {threshold}."
        )


def prompts_of(editor: MemoryModule) -> PromptMemory:
    """The memory of the model, which holds facts."""
    return cast(PromptMemory, editor.memory)


def tell(
    editor: MemoryModule,
    batch: EditBatch,
    contexts: Callable[[Sequence[EditRequest]], list[str]],
) -> MemoryWrite:
    """The edit after which the facts of a batch are told before prompts that are like theirs.

    Args:
        editor: The editor, whose memory is of prompts.
        batch: The requests.
        contexts: Gives what is told before the fact of each request, such as demonstrations.
    """
    requests = batch.requests
    entries = editor.entries_without([request.id for request in requests])
    with editor.memory.off(), torch.no_grad():
        prompts = [request.prompt for request in requests]
        embeddings = prompts_of(editor).encode(prompts, editor.tokens)
        before = contexts(requests)
        facts = [statement(r.prompt, r.target_new, r.glued) for r in requests]
        for request, context, fact, embedding in zip(
            requests, before, facts, embeddings, strict=True
        ):
            kept = {"prompt": request.prompt, "target": request.target_new}
            notes = {"context": context, "fact": fact}
            name = editor.entry_id(request.id, entries)
            entries[name] = MemoryEntry({"embeddings": embedding}, {request.id: kept}, notes)
        edit = editor.memory_write(entries)
        asked = [
            context + demonstration(fact, request.prompt)
            for request, context, fact in zip(requests, before, facts, strict=True)
        ]
        told = EditBatch.from_ids(
            [editor.tokens.prompt(text) for text in asked],
            [editor.tokens.target(r.prompt, r.target_new, r.glued) for r in requests],
            editor.tokens,
            requests,
        )
    edit.details["requests"] = [
        {
            "id": request.id,
            "steps": 0,
            "norm": float(torch.linalg.vector_norm(embedding)),
            "prompt_tokens": int(length),
        }
        for request, embedding, length in zip(
            requests, embeddings, told.prompt_lengths, strict=True
        )
    ]
    return edit
