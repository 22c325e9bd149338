# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""SCR: facts are looked up and told before the prompt, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.request import EditRequest
from lightning_edit.memories.prompts import PromptMemory
from lightning_edit.memories.text_encoder import folder_pooling
from lightning_edit.modules.memory_based.base import MemoryModule
from lightning_edit.modules.memory_based.prompting import check_threshold, prompts_of, tell

__all__ = ["SCR"]


class SCR(MemoryModule):
    """Selective contextual reasoning, its plain part: the nearest facts stand before the prompt.

    Nothing is trained and no weight is touched. It is the baseline that every other editor should
    be shown beside: what telling the model the fact is worth. A fact is told where its prompt is
    like the one asked; that the model be asked first whether the fact matters, as in the paper,
    is left out. Every answer costs the pass of the encoder and a longer prompt.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        encoder: Folder of a text encoder by which facts are found, such as one that
            sentence-transformers saved, whose own pooling is used then; mean hidden states of the
            language model's first sixth of blocks if None, which go more by wording.
        facts: Facts that a prompt is told at most, the most fitting last.
        threshold: Cosine between a prompt and that of a fact from which on the fact is told.
        max_entries: Entries that the memory may hold; any number if None.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].

    References:
        Knowledge Updating? No More Model Editing! Just Selective Contextual Reasoning,
        arXiv 2503.05212.

    Examples:
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> editor = SCR.from_model(*trained_tiny_model())
        >>> editor.edit(tiny_requests(2)).apply_(editor.model)
        >>> print(*editor.memory.rewrite(["What is the capital of Velmora?"], editor.tokens))
        New Fact: The capital of Velmora is Kettleby
        Prompt: What is the capital of Velmora?
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2503.05212"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")
    unused_arguments: ClassVar[Mapping[str, str]] = {
        "layers": "it tells facts in the prompt and changes no layer. Leave it out."
    }

    def __init__(
        self,
        model: str = "smollm2",
        encoder: str | None = None,
        facts: int = 1,
        threshold: float = -1.0,
        max_entries: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, max_entries=max_entries, **kwargs)
        check_threshold(threshold)
        self.encoder = encoder
        self.threshold = threshold
        if facts < 1:
            raise ValueError(f"`facts` is expected to be at least 1, but got {facts}.")
        self.facts = facts

    @override
    def build_memory(self, tree: ModelTree) -> PromptMemory:
        return PromptMemory(self.encoder, self.facts, self.threshold, folder_pooling(self.encoder))

    @property
    def prompts(self) -> PromptMemory:
        """The memory of the model."""
        return prompts_of(self)

    @override
    def compute_edit(self, batch: EditBatch) -> MemoryWrite:
        return tell(self, batch, self.contexts)

    def contexts(self, requests: Sequence[EditRequest]) -> list[str]:
        """What is told before the fact of each request: nothing."""
        return [""] * len(requests)
