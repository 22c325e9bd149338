# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""IKE: a fact is told with demonstrations of what follows from such facts, and what does not."""

# Shapes: R requests, N facts of the corpus, D width of an embedding.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_edit.core.batch import EditBatch
from lightning_edit.core.documents import parse_json, read_text
from lightning_edit.core.errors import RequestError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.request import EditRequest
from lightning_edit.memories.prompts import PromptMemory, demonstration, statement
from lightning_edit.memories.text_encoder import folder_pooling
from lightning_edit.modules.memory_based.base import MemoryModule
from lightning_edit.modules.memory_based.prompting import check_threshold, prompts_of, tell

__all__ = ["IKE", "DemonstrationKind"]

DemonstrationKind = Literal["copy", "update", "retain"]
_KINDS: tuple[DemonstrationKind, ...] = ("copy", "update", "retain")


class IKE(MemoryModule):
    """In-context knowledge editing: the fact stands before the prompt, after demonstrations.

    Each demonstration is another new fact and a prompt after it: the fact's own prompt (``copy``),
    the same in other words (``update``), or a prompt whose answer the fact must leave alone
    (``retain``). They are made of the facts of a corpus that are most like the edit, the nearest
    last. They are chosen when the edit is made and kept with it, so that nothing but the memory is
    needed to answer. Nothing is trained and no weight is touched.

    The price is paid at every answer: a prompt longer by 30 to 60 tokens a demonstration. Small
    models follow demonstrations poorly; see what ``count: 0`` gives.

    Facts are compared as they are told, without the blank line with which the authors end their
    queries: sentence encoders do not read it, and of mean hidden states it would be a part.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        corpus: File of edit requests with rephrases and locality probes, one in JSON a line; the
            facts that come with the package if None. Facts of the edit's own subject are left out.
        count: Demonstrations told before the fact. Where the corpus has fewer facts of other
            subjects, those are told, with a warning.
        ratio: Shares of the kinds ``copy``, ``update`` and ``retain``. A fact that has no rephrase
            or no probe of locality is copied.
        nearest_last: Order of the demonstrations.
        encoder: Folder of a text encoder by which facts are found, such as one that
            sentence-transformers saved, whose own pooling is used then; mean hidden states of the
            language model's first sixth of blocks if None, which go more by wording.
        threshold: Cosine between a prompt and that of a fact from which on the fact is told.
        max_entries: Entries that the memory may hold; any number if None.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].

    Raises:
        RequestError: From ``edit``, if the corpus cannot be read.

    References:
        Can We Edit Factual Knowledge by In-Context Learning?, arXiv 2305.12740, section 3.

    Examples:
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> editor = IKE.from_model(*trained_tiny_model(), count=2, ratio=[1, 1, 0])
        >>> [context] = editor.contexts(tiny_requests(1))
        >>> context.count("New Fact:")
        2
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2305.12740"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")
    unused_arguments: ClassVar[Mapping[str, str]] = {
        "layers": "it tells facts in the prompt and changes no layer. Leave it out."
    }

    def __init__(
        self,
        model: str = "smollm2",
        corpus: str | None = None,
        count: int = 32,
        ratio: Sequence[int] = (1, 3, 4),
        nearest_last: bool = True,
        encoder: str | None = None,
        threshold: float = -1.0,
        max_entries: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, max_entries=max_entries, **kwargs)
        check_threshold(threshold)
        self.encoder = encoder
        self.threshold = threshold
        if count < 0:
            raise ValueError(f"`count` is expected to be at least 0, but got {count}.")
        if len(ratio) != 3 or min(ratio) < 0 or not sum(ratio):
            raise ValueError(
                "`ratio` is expected to be three shares, of copy, update and retain, not all 0, "
                f"but got {list(ratio)}."
            )
        self.corpus = corpus
        self.count = count
        self.ratio = tuple(ratio)
        self.nearest_last = nearest_last
        self._known: tuple[list[EditRequest], Tensor] | None = None

    @override
    def build_memory(self, tree: ModelTree) -> PromptMemory:
        return PromptMemory(self.encoder, 1, self.threshold, folder_pooling(self.encoder))

    @property
    def prompts(self) -> PromptMemory:
        """The memory of the model."""
        return prompts_of(self)

    @override
    def compute_edit(self, batch: EditBatch) -> MemoryWrite:
        return tell(self, batch, self.contexts)

    def contexts(self, requests: Sequence[EditRequest]) -> list[str]:
        """What is told before the fact of each request: demonstrations."""
        if not self.count:
            return [""] * len(requests)
        if self._known is None:
            facts = self._read_corpus()
            self._known = facts, self.prompts.encode([_query(f) for f in facts], self.tokens)
        facts, embeddings = self._known
        queries = self.prompts.encode([_query(request) for request in requests], self.tokens)
        contexts: list[str] = []
        for request, cosines in zip(requests, queries @ embeddings.to(queries).T, strict=True):
            order = cosines.argsort(descending=True, stable=True).tolist()
            others = [facts[i] for i in order if not _is_about(facts[i], request)]
            if len(others) < self.count:
                rank_zero_warn(
                    f"`count` is {self.count}, of which {self._corpus_name()} can give "
                    f"{len(others)}: facts about the subject of `{request.id}` are left out. Give "
                    "a larger corpus, or a smaller count."
                )
            shown = [
                _demonstration(fact, kind, i)
                for i, (fact, kind) in enumerate(
                    zip(others, demonstration_kinds(self.count, self.ratio), strict=False)
                )
            ]
            contexts.append("".join(shown[::-1] if self.nearest_last else shown))
        return contexts

    def _corpus_name(self) -> str:
        return "the packaged facts" if self.corpus is None else f"`corpus={self.corpus!r}`"

    def _read_corpus(self) -> list[EditRequest]:
        where = self._corpus_name()
        if self.corpus is None:
            text = (files("lightning_edit.data") / "facts.jsonl").read_text(encoding="utf-8")
        else:
            try:
                text = read_text(Path(self.corpus))
            except (OSError, UnicodeDecodeError) as error:
                raise RequestError(
                    f"{where} cannot be read ({error}). Give a file of edit requests."
                ) from None
        facts: list[EditRequest] = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
            except ValueError as error:
                raise RequestError(f"{where}, line {number} is no JSON ({error}).") from None
            facts.append(
                EditRequest.from_dict(cast("dict[str, object]", record), f"{where}, line {number}")
            )
        if not facts:
            raise RequestError(f"{where} holds no facts to demonstrate with.")
        return facts


def demonstration_kinds(count: int, ratio: Sequence[int]) -> list[DemonstrationKind]:
    """Kinds of demonstrations in the shares of a ratio, spread evenly.

    Args:
        count: Demonstrations told before the fact, at most.
        ratio: Shares of copy, update and retain.

    Examples:
        >>> demonstration_kinds(8, (1, 3, 4))
        ['retain', 'update', 'retain', 'copy', 'update', 'retain', 'update', 'retain']
    """
    shares = [share / sum(ratio) for share in ratio]
    given = [0, 0, 0]
    kinds: list[DemonstrationKind] = []
    for i in range(1, count + 1):
        owed = [share * i - n for share, n in zip(shares, given, strict=True)]
        chosen = max(range(3), key=lambda kind: owed[kind])
        given[chosen] += 1
        kinds.append(_KINDS[chosen])
    return kinds


def _told(request: EditRequest) -> str:
    return statement(request.prompt, request.target_new, request.glued)


def _query(request: EditRequest) -> str:
    return demonstration(_told(request), request.prompt)


def _is_about(fact: EditRequest, request: EditRequest) -> bool:
    is_shared = bool(fact.subject) and fact.subject == request.subject
    return is_shared or fact.prompt == request.prompt


def _demonstration(fact: EditRequest, kind: DemonstrationKind, number: int) -> str:
    """A demonstration with a fact; of several rephrases or probes, they take turns."""
    glued = fact.glued
    kept = [p for p in fact.locality if p.answer.strip() and p.kind != "distracting"]
    if kind == "update" and fact.rephrases:
        prompt, answer = fact.rephrases[number % len(fact.rephrases)], fact.target_new
    elif kind == "retain" and kept:
        probe = kept[number % len(kept)]
        prompt, answer, glued = probe.prompt, probe.answer, probe.glued
    else:
        prompt, answer = fact.prompt, fact.target_new
    return demonstration(_told(fact), prompt, answer, glued)
