# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""T-Patcher: one neuron in an upper MLP for each token that the model gets wrong."""

# Shapes: P patches of a request, K patches before it, M remembered states, D hidden, V vocabulary,
# N target tokens.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from lightning_edit.core.batch import IGNORE_INDEX, EditBatch, pad_rows
from lightning_edit.core.errors import EditError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.sharding import plain
from lightning_edit.core.side_memory import MemoryEntry
from lightning_edit.functional.label_smoothing import smoothed_nll
from lightning_edit.functional.patches import activation_loss, margin_losses
from lightning_edit.memories.beside import beside_mlp
from lightning_edit.memories.patches import PatchNeurons, patch_output
from lightning_edit.modules.memory_based.base import MemoryModule
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.hooks import hooked
from lightning_edit.passes.replay import blocks_below, replayed
from lightning_edit.passes.sampling import sample_text_ids, seeded
from lightning_edit.passes.target_loss import target_logits

__all__ = ["PatchParameters", "TPatcher"]

CHECK_EVERY = 25  # steps


@dataclass
class PatchParameters:
    """What is learned of the patches of one request.

    Args:
        keys: k, [P, D].
        biases: b, [P].
        directions: w, [P, D]; a value is v = c · w.
        scales: c, [P].
    """

    keys: Tensor
    biases: Tensor
    directions: Tensor
    scales: Tensor

    @property
    def values(self) -> Tensor:
        """V = c · w, [P, D]."""
        return self.scales[:, None] * self.directions

    def all(self) -> list[Tensor]:
        """The four of them."""
        return [self.keys, self.biases, self.directions, self.scales]


class TPatcher(MemoryModule):
    """Transformer-Patcher: a ReLU neuron beside the last MLP for each wrong token of an answer.

    A patch adds relu(k·x + b) v to the MLP's output. It begins with k = h/‖h‖² of the state h at
    its token, so that it fires there with 1, and learns by L = L_edit + α Lₐ + m (L_m1 + L_m2):
    the answer's smoothed NLL, that the patch fires at its token, and that it fires at none of
    the remembered states, those of text that the model writes itself and of earlier edits.
    Earlier patches stay as they are. The requests of a batch are patched one after another.

    Training stops once the answer is right and the patches' silence on held-out states no longer
    improves; only the layers from the patched one on are run. To run a patched model costs N
    neurons a token. ReLU, whatever the model's own activation, has patches that do not fire add
    exactly nothing. A request that is answered rightly gets no patch and is not remembered.

    The paper remembers the training examples of its task. An editor of a language model is given
    none, so that text which the model writes itself stands for them; ``memory_texts`` gives
    others, such as the data that the model serves.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: The layer, one; the last if None.
        max_patches: Wrong tokens of a request that get a patch, the first ones.
        value_scale: c at the start; w is drawn from N(0, 1).
        activation_weight: α, the weight of Lₐ.
        memory_weight: m, the weight of the two memory losses.
        activation_threshold: μ, what a patch is to exceed at its token.
        memory_gap: γ₁, by how much remembered states are to lie below it.
        memory_ceiling: γ₂, what remembered states are to stay below.
        memory_tokens: States remembered of the texts, at most; a fifth is held out.
        memory_texts: Texts whose states are remembered, such as training examples with their
            answers; the model's own if None.
        smoothing: Label smoothing of L_edit.
        steps: Steps of Adam for a request, at most.
        first_check: Step from which on every 25th is checked.
        lr: Learning rate of Adam; halved where the loss at a check is no better by a twentieth
            twice.
        weight_decay: Weight decay of Adam.
        gradient_clip: Bound on the norm of the gradient.
        seed: Seed of w, of which the n-th neuron draws from seed + n, and of the model's text.
        max_entries: Neurons that the memory may hold; any number if None.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].

    Raises:
        EditError: If more than one layer is named.

    References:
        Transformer-Patcher: One Mistake Worth One Neuron, arXiv 2301.09785, section 3.

    Examples:
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> editor = TPatcher.from_model(*trained_tiny_model(), memory_tokens=64)
        >>> edit = editor.edit(tiny_requests(1))
        >>> edit.details["requests"][0]["patches"] == len(edit) > 0
        True
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2301.09785"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        max_patches: int = 5,
        value_scale: float = 10.0,
        activation_weight: float = 1.0,
        memory_weight: float = 10.0,
        activation_threshold: float = 0.0,
        memory_gap: float = 3.0,
        memory_ceiling: float = -3.0,
        memory_tokens: int = 2048,
        memory_texts: list[str] | None = None,
        smoothing: float = 0.1,
        steps: int = 2000,
        first_check: int = 100,
        lr: float = 1e-2,
        weight_decay: float = 1e-2,
        gradient_clip: float = 5.0,
        seed: int = 0,
        max_entries: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, max_entries, **kwargs)
        for name, value in (
            ("steps", steps),
            ("max_patches", max_patches),
            ("memory_tokens", memory_tokens),
        ):
            if value < 1:
                raise ValueError(f"`{name}` is expected to be at least 1, but got {value}.")
        if memory_texts is not None and not (memory_texts and all(t.strip() for t in memory_texts)):
            raise ValueError(
                "`memory_texts` is expected to hold texts that are not blank, but got "
                f"{memory_texts!r}."
            )
        if not 0 <= smoothing < 1:
            raise ValueError(
                f"`smoothing` is expected to be at least 0 and below 1, but got {smoothing}."
            )
        self.max_patches = max_patches
        self.value_scale = value_scale
        self.activation_weight = activation_weight
        self.memory_weight = memory_weight
        self.activation_threshold = activation_threshold
        self.memory_gap = memory_gap
        self.memory_ceiling = memory_ceiling
        self.memory_tokens = memory_tokens
        self.memory_texts = memory_texts
        self.smoothing = smoothing
        self.steps = steps
        self.first_check = first_check
        self.lr = lr
        self.weight_decay = weight_decay
        self.gradient_clip = gradient_clip
        self.seed = seed
        self._remembered: Tensor | None = None

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        return [len(tree.blocks) - 1]

    @override
    def build_memory(self, tree: ModelTree) -> PatchNeurons:
        layers = self.layers if self.layers is not None else self.default_layers(tree)
        if len(layers) != 1:
            raise EditError(f"TPatcher patches one layer, but `layers` names {layers}.")
        layer = tree.index(layers[0])
        tree.mlp_in(layer)  # which hooks need
        return PatchNeurons(layer)

    def initial_patches(self, queries: Tensor, first: int) -> PatchParameters:
        """Patches before they are learned.

        Args:
            queries: Inputs of the MLP at the wrong tokens, [P, D] float32.
            first: Number of neurons before these.
        """
        directions = [
            torch.randn(queries.shape[1], generator=torch.Generator().manual_seed(self.seed + n))
            for n in range(first, first + len(queries))
        ]
        return PatchParameters(
            queries / queries.square().sum(1, keepdim=True),
            queries.new_zeros(len(queries)),
            torch.stack(directions).to(queries.device),
            queries.new_full((len(queries),), self.value_scale),
        )

    def remembered_states(self) -> Tensor:
        """Inputs of the MLP at the tokens of the remembered texts, [M, D] float32."""
        if self._remembered is None:
            model, tree = self.model, self.tree
            rows, attended = self._memory_rows()
            inputs = {"input_ids": rows, "attention_mask": attended}
            if tree.is_encoder_decoder:  # what it writes to a word, read by its decoder
                inputs = {name: ids[:, :1] for name, ids in inputs.items()}
                inputs["decoder_input_ids"] = rows
            with borrowed(model), torch.no_grad(), self._seen() as seen:
                model(**inputs, use_cache=False)
            states = seen[0].reshape(-1, seen[0].shape[-1])[attended.flatten().bool()]
            states = states[: self.memory_tokens]
            with seeded(self.seed):  # neighbors in a text are alike
                self._remembered = states[torch.randperm(len(states)).to(states.device)].clone()
        return self._remembered.to(self.model.device)

    def _memory_rows(self) -> tuple[Tensor, Tensor]:
        """Token ids of the remembered texts, and which of them are no padding."""
        if self.memory_texts is None:
            rows = sample_text_ids(self.model, self.tokens, self.memory_tokens, self.seed)
            return rows, torch.ones_like(rows)
        ids = [self.tokens.tokenizer(text)["input_ids"] for text in self.memory_texts]
        rows, attended = (part.to(self.model.device) for part in pad_rows(ids, self.tokens.pad_id))
        return rows, attended

    @override
    def compute_edit(self, batch: EditBatch) -> MemoryWrite:
        entries = self.entries_without([request.id for request in batch.requests])
        with self.memory.off():
            self.remembered_states()
            rows = [self._patch(entries, batch.select([b])) for b in range(len(batch))]
        edit = self.memory_write(entries)
        edit.details["requests"] = rows
        return edit

    # -- one request -----------------------------------------------------------------------------

    @property
    def _layer(self) -> int:
        return int(self.memory.settings["layer"])

    def _patch(self, entries: dict[str, MemoryEntry], batch: EditBatch) -> RequestFigures:
        """Adds the patches of one request to the entries; returns what became of it."""
        tree, [request] = self.tree, batch.requests
        steps, norm, names = 0, 0.0, list[str]()
        with replayed(blocks_below(tree, self._layer)):
            with self._patched(entries), self._seen() as seen, torch.no_grad():
                logits, targets = target_logits(tree, batch)
            wrong = (logits.argmax(-1) != targets).nonzero()[: self.max_patches, 0]
            if len(wrong):
                columns = (batch.labels[0] != IGNORE_INDEX).nonzero()[wrong, 0]
                columns = columns if tree.is_encoder_decoder else columns - 1
                queries = seen[0].reshape(-1, seen[0].shape[-1])[columns]
                names = self._new_ids(request.id, len(wrong), entries)
                memory = torch.cat([self.remembered_states(), *self._queries(entries)])
                with self._patched(entries):
                    patches, steps = self._learn(batch, queries, memory, len(entries))
                norm = float(torch.linalg.vector_norm(patches.values.detach()))
                kept = {"prompt": request.prompt, "target": request.target_new}
                rows = (patches.keys, patches.biases, patches.values, queries)
                for i, name in enumerate(names):
                    tensors = {
                        field: tensor[i].detach().clone()
                        for field, tensor in zip(PatchNeurons.fields, rows, strict=True)
                    }
                    entries[name] = MemoryEntry(tensors, {request.id: kept})
        return {
            "id": request.id,
            "steps": steps,
            "norm": norm,
            "patches": len(names),
        }

    def _new_ids(
        self, request_id: str, count: int, entries: Mapping[str, MemoryEntry]
    ) -> list[str]:
        """Names of a request's new neurons."""
        filled: dict[str, MemoryEntry | None] = dict(entries)
        for _ in range(count):
            filled[self.entry_id(request_id, filled)] = None
        self.check_budget(filled)
        return list(filled)[len(entries) :]

    def _learn(
        self, batch: EditBatch, queries: Tensor, memory: Tensor, first: int
    ) -> tuple[PatchParameters, int]:
        """Learns patches of the states at wrong tokens; returns the best ones, and the steps."""
        held_out = memory[: len(self.remembered_states()) // 5]
        memory = memory[len(held_out) :]
        initial = self.initial_patches(queries, first)
        patches = PatchParameters(*(nn.Parameter(t.detach().clone()) for t in initial.all()))
        parameters = patches.all()
        adam = Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        plateau = ReduceLROnPlateau(adam, factor=0.5, patience=1, threshold=0.05)
        best, lowest, waited, step = parameters, float("inf"), 0, 0
        for step in range(1, self.steps + 1):
            loss = self._loss(batch, patches, queries, memory)[0]
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(loss, parameters), strict=True
            ):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(parameters, self.gradient_clip)
            adam.step()
            if step < self.steps and (step < self.first_check or step % CHECK_EVERY):
                continue
            with torch.no_grad():
                loss, is_right = self._loss(batch, patches, queries, memory)
                silence = float(sum(self._margins(patches, queries, held_out)))
            plateau.step(float(loss))
            if not is_right:
                continue
            if silence < lowest - 1e-3:
                best = [parameter.detach().clone() for parameter in parameters]
                lowest, waited = silence, 0
            else:
                waited += 1
                if waited > 1:
                    break
        return PatchParameters(*best), step

    def _loss(
        self, batch: EditBatch, patches: PatchParameters, queries: Tensor, memory: Tensor
    ) -> tuple[Tensor, bool]:
        """The loss, and whether all tokens of the answer are right."""
        with self._added(patches.keys, patches.biases, patches.values):
            logits, targets = target_logits(self.tree, batch)
        fired = (patches.keys * queries).sum(1) + patches.biases
        loss = smoothed_nll(logits, targets, self.smoothing).mean()
        loss = loss + self.activation_weight * activation_loss(fired, self.activation_threshold)
        loss = loss + self.memory_weight * sum(self._margins(patches, queries, memory))
        return loss, bool((logits.argmax(-1) == targets).all())

    def _margins(
        self, patches: PatchParameters, queries: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        fired = (patches.keys * queries).sum(1) + patches.biases
        others = memory @ patches.keys.T + patches.biases
        return margin_losses(others, fired, self.memory_gap, self.memory_ceiling)

    def _queries(self, entries: Mapping[str, MemoryEntry]) -> list[Tensor]:
        return [entry.tensors["queries"][None] for entry in entries.values()]

    @contextmanager
    def _patched(self, entries: Mapping[str, MemoryEntry]) -> Iterator[None]:
        """Has the neurons of entries beside the MLP inside a ``with`` block."""
        if not entries:
            yield
            return
        fields = PatchNeurons.fields[:3]
        rows = [torch.stack([e.tensors[field] for e in entries.values()]) for field in fields]
        with self._added(*rows):
            yield

    @contextmanager
    def _added(self, keys: Tensor, biases: Tensor, values: Tensor) -> Iterator[None]:
        """Has neurons beside the MLP, on top of any others, inside a ``with`` block."""
        handles = beside_mlp(
            self.tree, self._layer, lambda states: patch_output(states, keys, biases, values)
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _seen(self) -> Iterator[list[Tensor]]:
        """Collects what goes into the MLP inside a ``with`` block."""
        seen: list[Tensor] = []
        layer = self.tree.mlp_in(self._layer)[0].module(self.model)

        def record(_: nn.Module, args: tuple[Tensor, ...], __: object) -> None:
            seen.append(plain(args[0]).float())

        with hooked(before={layer: record}):
            yield seen
