# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""SERAC: edits are remembered in words, and a counterfactual model answers in their scope."""

# Shapes: B requests, R prompts in the scope of one of them, N entries, D width of an embedding.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from typing_extensions import override

from lightning_edit.core.batch import IGNORE_INDEX, EditBatch, PromptTokenizer
from lightning_edit.core.errors import ArtifactError, EditError, ModelError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest
from lightning_edit.core.sharding import ends_whole
from lightning_edit.core.side_memory import EditMemory, MemoryEntry
from lightning_edit.functional.scope import Distance, scope_distances, scope_loss
from lightning_edit.memories.prompts import statement
from lightning_edit.memories.scope import ScopeMemory
from lightning_edit.memories.scope_encoder import FolderEncoder
from lightning_edit.memories.text_encoder import PLAIN_POOLING, folder_pooling, pooling_setting
from lightning_edit.models import load_tokenizer, resolve_model
from lightning_edit.modules.fitting import EditState
from lightning_edit.modules.memory_based.base import MemoryModule
from lightning_edit.modules.meta_learning.checkpoints import (
    EditorCheckpoint,
    read_editor,
    take_network,
)
from lightning_edit.modules.meta_learning.objectives import Objective, WeightedSum
from lightning_edit.modules.meta_learning.training import EditorTraining, is_ready, zero_loss
from lightning_edit.modules.meta_learning.training_batch import TrainingBatch, TrainOn
from lightning_edit.modules.targets import MemoryTarget, Target
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.target_loss import target_logits

__all__ = ["SERAC"]


class NetworkState:
    """What a run that goes on has to know of the networks beside their weights."""

    def __init__(self) -> None:
        #: The networks; there once the model is.
        self.network: nn.Module | None = None
        #: Whether they have been trained, and since the memory took note of them.
        self.is_trained = False
        self.has_moved = False

    def edit_state(self) -> EditState:
        """Whether the networks were trained, the hash of what they came to, and the pooling."""
        is_known = self.is_trained and self.network is not None
        weights = weight_hash(cast(nn.Module, self.network)) if is_known else None
        encoder = self._folder_encoder()
        state: EditState = {"is_trained": self.is_trained, "weights": weights}
        if encoder is not None and pooling_setting(encoder.pooling):
            state["pooling"] = encoder.pooling
        return state

    def check_edit_state(self, state: Mapping[str, Any]) -> None:
        """Checks that networks out of a checkpoint are of this encoder's pooling.

        Raises:
            ArtifactError: If they are of another.
        """
        encoder = self._folder_encoder()
        if encoder is not None:
            encoder.check_pooling(state.get("pooling", PLAIN_POOLING))

    def load_edit_state(self, state: EditState) -> None:
        """Takes over what ``edit_state`` returned; the networks are loaded by others."""
        self.check_edit_state(state)
        self.is_trained = self.has_moved = bool(state["is_trained"])

    def _folder_encoder(self) -> FolderEncoder | None:
        encoder = getattr(self.network, "encoder", None)
        return encoder if isinstance(encoder, FolderEncoder) else None


class SERAC(MemoryModule):
    """Semi-parametric editing: a scope classifier, and a counterfactual model that reads the edit.

    An edit is kept as text; no gradient is taken and no weight written. A prompt q is compared with
    all edits z by s = exp(−‖g(z) − g(q)‖²). If the largest s is above ``threshold``, a
    counterfactual model answers, with the edit before the prompt; else the base does, bit for bit.
    Edits are embedded once, when they are made; which edit a prompt belongs to is decided once,
    when it is read. What that costs: the encoder's pass over the prompt, and on a hit the pass of
    the counterfactual model beside that of the base.

    Encoder and counterfactual model are trained by ``fit``, together, on 0.1 · NLL of the new
    answers given their edits, and a balanced cross-entropy of s: high for prompts and rephrases of
    an edit, low for its locality probes. ``TrainedEditor`` then commits edits. With ``pretrained``
    nothing is trained, and ``fit`` commits edits itself.

    Of edits that contradict each other the newer one holds: what an edit overrides, ``details``
    names, and it holds again once the newer one is removed.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Blocks that the counterfactual model's adapters stand beside; all if None.
        encoder: Folder of a text encoder, such as one that sentence-transformers saved, whose own
            pooling is used then, from which the scope classifier begins; a small one of its own
            over the base's token embeddings if None.
        counterfactual: Hub id or folder of a small language model with the base's tokenizer, from
            which the counterfactual model begins; low-rank adapters beside the frozen base, which
            begin as the base itself, if None.
        distance: ‖g(z) − g(q)‖² (``euclidean``) or 1 − cos (``cosine``).
        scale: What the distance is multiplied by.
        threshold: What s must exceed.
        separator: Text between an edit and the prompt that the counterfactual model answers.
        answer_mark: Text between an edit's prompt and its answer as the classifier reads it, such
            as the paper's `` [SEP] ``; none if empty.
        width: D of an encoder of its own.
        depth: Layers of that encoder.
        heads: Attention heads of that encoder.
        rank: Rank of the adapters.
        alpha: Adapters count ``alpha / rank``.
        pretrained: Encoder and counterfactual model are used as they are.
        train_on: Prompts in the scope of a request: a rephrase, its prompt, or both.
        use_all_negatives: Every locality probe is out of the scope of every request of its batch,
            not of its own alone.
        cross_negatives: Prompts in the scope of one request of a batch are out of the scope of its
            other requests.
        lr: Learning rate of the counterfactual model (Adam).
        encoder_lr: Learning rate of the encoder.
        edit_weight: Weight of the counterfactual model's loss.
        scope_weight: Weight of the classifier's loss.
        seed: Of the numbers that networks begin with.
        max_entries: Edits that the memory may hold; any number if None.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].

    Raises:
        ModelError: If the counterfactual model has another tokenizer, or a folder cannot be read.

    References:
        Memory-Based Model Editing at Scale, arXiv 2206.06520, section 3.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_edit import EditDataModule
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> editor = SERAC.from_model(*trained_tiny_model(), width=32)
        >>> quiet = dict(logger=False, enable_checkpointing=False, limit_val_batches=0,
        ...              enable_progress_bar=False, enable_model_summary=False)
        >>> Trainer(max_epochs=1, **quiet).fit(editor, EditDataModule(requests=tiny_requests(4)))
        >>> editor.edit(tiny_requests(2))
        MemoryWrite(ScopeMemory: 2 entries)
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2206.06520"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")
    figures: ClassVar[tuple[str, ...]] = ("loss", "edit", "scope", "recall", "specificity")

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        encoder: str | None = None,
        counterfactual: str | None = None,
        distance: Distance = "euclidean",
        scale: float = 1.0,
        threshold: float = 0.5,
        separator: str = "\n",
        answer_mark: str = "",
        width: int = 256,
        depth: int = 2,
        heads: int = 4,
        rank: int = 8,
        alpha: float = 16.0,
        pretrained: bool = False,
        train_on: TrainOn = "both",
        use_all_negatives: bool = False,
        cross_negatives: bool = False,
        lr: float = 5e-4,
        encoder_lr: float = 3e-4,
        edit_weight: float = 0.1,
        scope_weight: float = 1.0,
        seed: int = 0,
        max_entries: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, max_entries, **kwargs)
        for name, number in (("width", width), ("depth", depth), ("heads", heads), ("rank", rank)):
            if number < 1:
                raise ValueError(f"`{name}` is expected to be at least 1, but got {number}.")
        if width % heads:
            raise ValueError(f"`width` is {width}, which {heads} `heads` do not divide.")
        if not 0 <= threshold < 1:
            raise ValueError(
                f"`threshold` is expected to be from 0 to below 1, but got {threshold}."
            )
        if scale <= 0:
            raise ValueError(f"`scale` is expected to be above 0, but got {scale}.")
        self.encoder = encoder
        self.counterfactual = counterfactual
        self.distance: Distance = distance
        self.scale = scale
        self.threshold = threshold
        self.separator = separator
        self.answer_mark = answer_mark
        self.width = width
        self.depth = depth
        self.heads = heads
        self.rank = rank
        self.alpha = alpha
        self.pretrained = pretrained
        self.train_on: TrainOn = train_on
        self.use_all_negatives = use_all_negatives
        self.cross_negatives = cross_negatives
        self.lr = lr
        self.encoder_lr = encoder_lr
        self.seed = seed
        #: What is trained; there once the model is.
        self.network: Any = None
        self.objective: Objective = WeightedSum(edit_weight, scope_weight)
        self.network_training = EditorTraining[MemoryWrite](self.figures)
        self.val_losses = self.network_training.losses  # moves to other devices with the editor
        self.network_state = NetworkState()
        self.parts += [self.network_training, self.network_state]
        if not pretrained:
            self.fit_by(self.network_training)
        self._made: tuple[ScopeMemory, ...] = ()  # out of sight of Lightning

    @property
    def scopes(self) -> ScopeMemory:
        """The memory of the model."""
        return cast(ScopeMemory, self.memory)

    # -- a model -------------------------------------------------------------------------------

    def _check_tokenizer(self) -> None:
        """Checks that the counterfactual model reads the base's tokens."""
        if self.counterfactual is None:
            return
        tokenizer = self.tokens.tokenizer
        other = load_tokenizer(self.counterfactual, cache_dir=self.cache_dir)
        if other.get_vocab() != tokenizer.get_vocab():
            raise ModelError(
                f"`counterfactual={self.counterfactual!r}` has another tokenizer than "
                f"{self.model_id}: {len(other)} tokens and {len(tokenizer)}, not all alike. Give a "
                "model of the same tokenizer, or null for adapters beside the base."
            )

    @override
    def build_memory(self, tree: ModelTree) -> ScopeMemory:
        special = set(self.tokens.tokenizer.all_special_ids)  # such as that of unknown characters
        where = self.counterfactual
        return ScopeMemory(
            encoder=self.encoder,
            counterfactual=(
                None if where is None else resolve_model(where, cache_dir=self.cache_dir)
            ),
            distance=self.distance,
            scale=self.scale,
            threshold=self.threshold,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            layers=self.layers,
            rank=self.rank,
            alpha=self.alpha,
            separator=[i for i in self._plain_ids(self.separator) if i not in special],
            seed=self.seed,
            pooling=folder_pooling(self.encoder),
        )

    @override
    def make_target(self, tree: ModelTree) -> Target[MemoryWrite]:
        """A memory, whose networks are what is trained."""
        self._check_tokenizer()
        memory = self._memory_for(tree)
        target = MemoryTarget(tree.model, memory)
        self.network = self.network_state.network = memory.network
        if self.pretrained:
            self.network.requires_grad_(False)
        return target

    def _memory_for(self, tree: ModelTree) -> ScopeMemory:
        found = EditMemory.find(tree.model)
        if found is None and self._made:
            return self._made[0]
        memory = self.build_memory(tree)
        if found is None:
            memory.prepare(tree.model)
            if isinstance(memory.network.encoder, FolderEncoder):
                memory.network.encoder.take_tokenizer(self.tokens.tokenizer)
            self._made = (memory,)
            return memory
        # What it was trained to be is no setting of this editor.
        memory.settings["weights"] = found.settings.get("weights")
        found.check_kind(type(memory).__name__, memory.settings)
        return cast(ScopeMemory, found)

    # -- trained networks --------------------------------------------------------------------

    def check_ready(self) -> None:
        """Checks that the networks can edit.

        Raises:
            EditError: If they were never trained, and are to be.
        """
        if not (self.pretrained or self.network_state.is_trained):
            raise EditError(
                "This SERAC was never trained: its classifier knows no scopes. Train it with "
                "`Trainer.fit`, load a trained one with `load_editor(checkpoint)` or "
                "`TrainedEditor(checkpoint=...)`, or set `pretrained` where `encoder` and "
                "`counterfactual` need no training."
            )

    @property
    def is_ready(self) -> bool:
        """Whether the networks can edit."""
        return is_ready(self)

    @property
    def skipped(self) -> int:
        """Steps that were left out because a loss or a gradient was not finite."""
        return self.network_training.skipped

    def trained_for(self) -> list[str]:
        """Names of the parameters that the networks belong to: they change none."""
        return []

    def load_editor(self, checkpoint: str | Path, *, any_base: bool = False) -> None:
        """Takes over networks that were trained before.

        Args:
            checkpoint: A checkpoint of a fit with the same settings.
            any_base: Edit a model with other weights than those they were trained with.

        Raises:
            ArtifactError: If it is no such checkpoint, belongs to another model, or the memory
                holds edits that were made by other networks.
        """
        self.take_editor(read_editor(checkpoint), str(checkpoint), any_base=any_base)

    def take_editor(self, saved: EditorCheckpoint, where: str, *, any_base: bool) -> None:
        """Takes over a checkpoint in memory; see ``load_editor``.

        Args:
            saved: What ``read_editor`` has read.
            where: Its name in errors.
            any_base: As in ``load_editor``.
        """
        state = saved["lightning_edit"]["edit_state"]
        self.network_state.check_edit_state(state)
        known = state.get("weights")
        if len(self.scopes) and known != self.scopes.settings["weights"]:
            raise ArtifactError(
                f"The model remembers {len(self.scopes)} edits that were made by other networks "
                f"than those in `{where}`. Use the checkpoint that they were made with, or take "
                "them out with `EditMemory.find(model).detach_()`."
            )
        take_network(self, self.network, [], saved, where, any_base=any_base)
        self.scopes.note_weights()
        self.session.target = MemoryTarget(self.model, self.scopes)  # with these networks

    # -- edits ---------------------------------------------------------------------------------

    @override
    def compute_edit(self, batch: EditBatch) -> MemoryWrite:
        self.check_ready()
        memory, requests, tokens = self.scopes, batch.requests, batch.tokens
        if self.network_state.has_moved:
            memory.note_weights()
            self.network_state.has_moved = False
        texts = [self._text(request, tokens) for request in requests]
        prompts = [tokens.prompt(request.prompt) for request in requests]
        targets = [tokens.target(r.prompt, r.target_new, r.glued) for r in requests]
        separator = memory.settings["separator"]
        for request, text, prompt, target in zip(requests, texts, prompts, targets, strict=True):
            tokens.check_length(request, len(text) + len(separator) + len(prompt), len(target))
        entries = self.entries_without([request.id for request in requests])
        with memory.off(), ends_whole(self.model):
            read = [self._scope_text(request, tokens) for request in requests]
            embeddings, queries = memory.encode([*read, *prompts]).chunk(2)
        rows: list[RequestFigures] = []
        for b, request in enumerate(requests):
            overridden = self._overridden(entries, queries[b], targets[b])
            name = self.entry_id(request.id, entries)
            notes = {
                "ids": texts[b],
                "label": targets[b],
                "number": self.next_number(entries),
                "overrides": overridden,
            }
            kept = {"prompt": request.prompt, "target": request.target_new}
            entries[name] = MemoryEntry({"embeddings": embeddings[b]}, {request.id: kept}, notes)
            similarity = torch.exp(-self._distances(queries[b : b + 1], embeddings[b : b + 1]))
            row: RequestFigures = {"id": request.id, "entry": name, "steps": 0}
            row["similarity"] = float(similarity)
            row["norm"] = float(torch.linalg.vector_norm(embeddings[b]))
            if overridden:
                row["overrides"] = overridden
            rows.append(row)
        edit = self.memory_write(entries)
        edit.details["requests"] = rows
        return edit

    def _text(self, request: EditRequest, tokens: PromptTokenizer) -> list[int]:
        """The edit in words: its prompt and answer, as tokens, without an end."""
        if tokens.is_encoder_decoder:  # it reads the answer, which it does not write here
            text = statement(request.prompt, request.target_new, request.glued)
            return [i for i in tokens.prompt(text) if i != tokens.eos_id]
        answer = tokens.target(request.prompt, request.target_new, request.glued)
        return [*tokens.prompt(request.prompt), *answer]

    def _scope_text(self, request: EditRequest, tokens: PromptTokenizer) -> list[int]:
        """The edit as the classifier reads it, as tokens."""
        if not self.answer_mark:
            return self._text(request, tokens)
        prompt, mark = tokens.prompt(request.prompt), self._plain_ids(self.answer_mark)
        answer = tokens.target(request.prompt, request.target_new, request.glued)
        return [i for i in (*prompt, *mark, *answer) if i != tokens.eos_id]

    def _plain_ids(self, text: str) -> list[int]:
        """Tokens of a text by itself."""
        found = self.tokens.tokenizer(text, add_special_tokens=False)
        return [int(i) for i in found["input_ids"]]

    def _distances(self, queries: Tensor, edits: Tensor) -> Tensor:
        return scope_distances(queries, edits, self.distance, self.scale)

    def _overridden(
        self, entries: Mapping[str, MemoryEntry], query: Tensor, target: Sequence[int]
    ) -> list[str]:
        """Entries with another answer whose scope the prompt of a new edit is in."""
        if not entries:
            return []
        edits = torch.stack([e.tensors["embeddings"].to(query.device) for e in entries.values()])
        similar = torch.exp(-self._distances(query[None], edits))[0]
        return [
            name
            for (name, entry), s in zip(entries.items(), similar.tolist(), strict=True)
            if s > self.threshold and list(entry.notes["label"]) != list(target)
        ]

    # -- fit -----------------------------------------------------------------------------------

    def network_optimizer(self) -> Optimizer:
        """Adam, with a learning rate each for the encoder and the counterfactual model."""
        parts = (
            (self.network.encoder, self.encoder_lr),
            (self.network.counterfactual, self.lr),
        )
        groups = [
            {"params": [p for p in part.parameters() if p.requires_grad], "lr": lr}
            for part, lr in parts
        ]
        return Adam(groups)

    def edit_loss(
        self, requests: Sequence[EditRequest], processes: Processes | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of the counterfactual model and that of the classifier on some requests.

        Args:
            requests: With rephrases and locality probes.
            processes: Those that train together, each of which takes its share of the
                counterfactual model's rows; None to only look.

        Returns:
            The weighted sum, a scalar, and the figures ``loss``, ``edit`` (NLL of the new answers,
            in nats a token), ``scope`` (balanced cross-entropy), ``recall`` (share of prompts in
            the scope of an edit that are above the threshold) and ``specificity`` (share of the
            others that are not); no figures and a loss of zero where something was not finite.

        Raises:
            RequestError: If a request lacks a rephrase or a locality probe.
            EditError: If edits are remembered, and the networks are to be trained.
        """
        if processes is not None:
            self._check_nothing_remembered()
        turn = self.current_epoch if processes is not None else 0
        batch = TrainingBatch.from_requests(
            requests, self.tokens, train_on=self.train_on, turn=turn
        )
        if processes is not None:
            self.network_state.is_trained = self.network_state.has_moved = True
        owners = batch.outer_owners
        texts = [self._text(request, self.tokens) for request in requests]
        asked, others = _prompts(batch.outer), _prompts(batch.locality)
        one = processes or Processes()
        mine = one.share(len(asked))
        read = [self._scope_text(request, self.tokens) for request in requests]
        with borrowed(self.model):
            part = self._answer_loss(batch.outer, [texts[i] for i in owners], asked, mine)
            with self.memory.off(), ends_whole(self.model):
                found = self.network.encoder.encode(self.model, [*read, *asked, *others])
        nll = one.total(part.detach())
        edits, inner, outer = found.split([len(texts), len(asked), len(others)])
        near, far = self._distances(inner, edits), self._distances(outer, edits)
        is_own = torch.zeros_like(near, dtype=torch.bool)
        is_own[torch.arange(len(asked)), owners] = True
        inside = near[is_own]
        outside = far.flatten() if self.use_all_negatives else far.diagonal()
        if self.cross_negatives:
            outside = torch.cat([outside, near[~is_own]])
        scope = scope_loss(inside, outside)
        # Processes average their gradients, whereas `nll` is a sum over shares.
        edit_weight, scope_weight = self.objective.weights(self.network)
        loss = edit_weight * one.count * part + scope_weight * scope
        value = edit_weight * nll + scope_weight * scope.detach()
        if not one.agree(bool(value.isfinite())):
            return zero_loss(self.network), {}
        loss = loss - loss.detach() + value
        hits, misses = (torch.exp(-d) > self.threshold for d in (inside, outside))
        return loss, {
            "loss": float(loss.detach()),
            "edit": float(nll.detach()),
            "scope": float(scope.detach()),
            "recall": float(hits.float().mean()),
            "specificity": 1 - float(misses.float().mean()),
        }

    def _check_nothing_remembered(self) -> None:
        if len(self.scopes):
            raise EditError(
                f"The memory holds {len(self.scopes)} edits, whose embeddings the networks as they "
                "are have made, and training would change them. Take the edits out "
                "(`editor.remove([id])`) and make them again afterwards."
            )

    def _answer_loss(
        self,
        outer: EditBatch,
        texts: Sequence[Sequence[int]],
        prompts: Sequence[Sequence[int]],
        mine: Sequence[int],
    ) -> Tensor:
        """NLL of answers by the counterfactual model, which reads each edit before.

        Returns:
            The sum over the tokens of some rows, as a share of the mean over those of all.
        """
        if not mine:
            return zero_loss(self.network)
        separator = self.scopes.settings["separator"]
        targets = [row[row != IGNORE_INDEX].tolist() for row in outer.labels]
        rows = [[*texts[i], *separator, *prompts[i]] for i in mine]
        device = next(self.model.parameters()).device
        batch = EditBatch.from_ids(rows, [targets[i] for i in mine], outer.tokens).to(device)
        with self.memory.off(), self.network.counterfactual.answering(self.model) as other:
            logits, labels = target_logits(ModelTree.of(other), batch)
        return self.objective.token_loss(logits, labels).sum() / sum(map(len, targets))


def _prompts(batch: EditBatch) -> list[list[int]]:
    """Tokens of the prompts of a batch."""
    lengths = batch.prompt_lengths.tolist()
    return [ids[:n].tolist() for ids, n in zip(batch.input_ids, lengths, strict=True)]
