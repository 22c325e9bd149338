# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""WISE: edits in side copies of one late matrix, and a rule when a copy is used."""

# Shapes: C contexts of a request, L texts of the model's own, Z entries that a copy may change,
# O outputs and I inputs of the layer, T positions.

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_edit.core.batch import EditBatch, pad_rows
from lightning_edit.core.errors import EditError, ModelError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.locator import Locator, ModelTree, StackKind, WeightSite
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.request import EditRequest
from lightning_edit.core.sharding import plain
from lightning_edit.core.side_memory import MemoryEntry
from lightning_edit.functional.wise import activation_distance, routing_loss
from lightning_edit.memories.prompts import statement
from lightning_edit.memories.side_matrix import RoutesBy, SideMatrices
from lightning_edit.modules.memory_based.base import MemoryModule
from lightning_edit.passes.hooks import hooked
from lightning_edit.passes.replay import blocks_below, replayed
from lightning_edit.passes.sampling import sample_text_ids
from lightning_edit.passes.target_loss import row_means, target_nll

__all__ = ["WISE"]

OTHER_TEXTS = 512  # tokens of the model's own text, 64 in each

# What a prompt may stand behind.
CONTEXTS = ("{}", "Today. {}", "In short: {}", "The report said that {}", "As we all know, {}")


class WISE(MemoryModule):
    """A side copy W' of one late matrix takes the edits, and answers where it moves much.

    D(x), the mean over a prompt's tokens of ‖a(x W'ᵀ) − a(x Wᵀ)‖, tells whether a prompt is about
    an edit. An edit is learned by SGD on L = NLL(target) + Lₐ, over the prompt behind several
    contexts; Lₐ keeps D of other text below α, that of the edit above β, and γ between them. Only a
    random share of the entries of W' may change, redrawn for each copy, and only these decay. At
    inference W' is used if D is at least ``act_ratio`` times the least D of its edits.

    After ``copy_size`` edits a fresh copy is begun; of full copies ``merged_copies`` are made one
    by TIES. The requests of a batch are learned one after another, and each one's change is
    kept by itself, so that it can be taken out again. The layers below are run once. Inference
    costs one product with each copy for a prompt, and one for a generated token of a routed row.

    Edits of one copy write over each other, the more so the smaller the matrix is: a copy of 500
    is the paper's, for matrices of 45 million entries. ``replay`` has an edit keep the answers of
    those that are in its copy already.

    The margins are activations, not shares: every model has its own.

    The paper has the side copy, Lₐ, the masks and the merge. From the authors' code, which the
    figures were made with, come D as it is above, ``act_ratio``, ``bound``, the weight decay, the
    contexts and the end of the search. Two things differ from both. The other text of Lₐ is the
    model's own, not the request's ``locality``, by which it is measured afterwards; ``other_texts``
    and ``own_locality`` give another. And D is a mean however long a prompt is, so that a fact
    asked at the end of a page moves it little; ``long_prompt=100`` is the code's answer to it.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: The layer, one; at 0.84 of the depth if None.
        stack: The stack of an encoder-decoder model. In the encoder D is of a prompt's tokens, in
            the decoder of its first.
        margins: α, β and γ of Lₐ.
        act_ratio: Share of the least D of a copy's edits from which on it answers.
        keep_ratio: Share ρ of its entries that a copy may change.
        context_templates: Texts that end in ``{}``, where the prompt goes; five plain ones if None.
        steps: Steps of SGD for a request, at most.
        lr: Learning rate of SGD.
        weight_decay: Weight decay of the entries of W' that may change.
        bound: Largest change of an entry.
        stop_loss: An edit is learned when the loss is below it and moves by 10⁻⁴ at most.
        copy_size: Edits of a copy.
        merged_copies: Copies that are merged.
        density: Share of entries that TIES keeps of each.
        routes_by: What is largest in the copy that answers a prompt: D, as in the paper, or its
            ``ratio`` to the least D of the copy's edits, which compares copies of unlike strength.
        replay: Learn an edit together with the earlier ones of its copy, a row each; the paper
            does without.
        seed: Seed of the masks, of which the s-th copy draws from seed + s, and of the model's
            own text, which Lₐ takes for other text.
        max_entries: Edits that the memory may hold; any number if None.
        other_texts: Texts that Lₐ takes for other text, each edit one of them in turn; the model's
            own if None.
        own_locality: Lₐ takes the probes in a request's ``locality``, with their answers, for other
            text, one of them in turn; ``other_texts`` where a request has none. Locality is then
            to be measured by other probes.
        long_prompt: Tokens of a prompt from which on the largest distance of a token counts as its
            D when it is asked, not their mean; never if None.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].

    Raises:
        EditError: If more than one layer is named.

    References:
        WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models,
        arXiv 2405.14768, section 2.3.

    Examples:
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> editor = WISE.from_model(*trained_tiny_model(), steps=3)
        >>> editor.edit(tiny_requests(2))
        MemoryWrite(SideMatrices: 2 entries)
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2405.14768"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        stack: StackKind = "decoder",
        margins: Sequence[float] = (5.0, 20.0, 10.0),
        act_ratio: float = 0.88,
        keep_ratio: float = 0.2,
        context_templates: list[str] | None = None,
        steps: int = 70,
        lr: float = 1.0,
        weight_decay: float = 1e-5,
        bound: float = 1.0,
        stop_loss: float = 0.02,
        copy_size: int = 500,
        merged_copies: int = 2,
        density: float = 0.53,
        routes_by: RoutesBy = "distance",
        replay: bool = False,
        seed: int = 0,
        max_entries: int | None = None,
        other_texts: list[str] | None = None,
        own_locality: bool = False,
        long_prompt: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, max_entries, **kwargs)
        if other_texts is not None and not (other_texts and all(t.strip() for t in other_texts)):
            raise ValueError(
                "`other_texts` is expected to hold texts that are not blank, but got "
                f"{other_texts!r}."
            )
        self.other_texts = other_texts
        self.own_locality = own_locality
        self.long_prompt = long_prompt
        for name, count in (
            ("steps", steps),
            ("copy_size", copy_size),
            ("merged_copies", merged_copies),
            ("long_prompt", 1 if long_prompt is None else long_prompt),
        ):
            if count < 1:
                raise ValueError(f"`{name}` is expected to be at least 1, but got {count}.")
        for name, share in (("keep_ratio", keep_ratio), ("density", density)):
            if not 0 < share <= 1:
                raise ValueError(
                    f"`{name}` is expected to be above 0 and at most 1, but got {share}."
                )
        if len(margins) != 3:
            raise ValueError(f"`margins` is expected to be α, β and γ, but got {list(margins)}.")
        for template in context_templates or ():
            if not template.endswith("{}"):
                raise ValueError(
                    f"`context_templates`: {template!r} is expected to end in {{}}, where the "
                    "prompt goes."
                )
        self.stack: StackKind = stack
        self.margins = tuple(margins)
        self.act_ratio = act_ratio
        self.keep_ratio = keep_ratio
        self.contexts = tuple(context_templates or CONTEXTS)
        self.steps = steps
        self.lr = lr
        self.weight_decay = weight_decay
        self.bound = bound
        self.stop_loss = stop_loss
        self.copy_size = copy_size
        self.merged_copies = merged_copies
        self.density = density
        self.routes_by: RoutesBy = routes_by
        self.replay = replay
        self.seed = seed
        self._others: tuple[Tensor, Tensor, Tensor] | None = None

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        return [min(round(0.84 * len(tree.blocks)), len(tree.blocks) - 1)]

    @override
    def build_memory(self, tree: ModelTree) -> SideMatrices:
        site = self._site(tree)
        return SideMatrices(
            site.module_name,
            (site.out_features, site.in_features),
            self.stack,
            _activation_name(tree.model),
            self.act_ratio,
            self.keep_ratio,
            self.copy_size,
            self.merged_copies,
            self.bound,
            self.density,
            self.seed,
            self.routes_by,
            self.long_prompt,
        )

    @property
    def side(self) -> SideMatrices:
        """The memory of the model."""
        return cast(SideMatrices, self.memory)

    @override
    def compute_edit(self, batch: EditBatch) -> MemoryWrite:
        entries = self.entries_without([request.id for request in batch.requests])
        rows: list[RequestFigures] = []
        with self.memory.off():
            for b in range(len(batch)):
                number = self.next_number(entries)
                request = batch.requests[b]
                name = self.entry_id(request.id, entries)
                self.check_budget({**entries, **dict.fromkeys([name])})
                tensors, figures = self._learn(batch.select([b]), number, entries)
                kept: dict[str, str | bool] = {
                    "prompt": request.prompt,
                    "target": request.target_new,
                }
                if request.glued is not None:
                    kept["glued"] = request.glued
                entries[name] = MemoryEntry(tensors, {request.id: kept}, {"number": number})
                rows.append({**figures, "id": request.id})
        edit = self.memory_write(entries)
        edit.details["requests"] = rows
        return edit

    # -- one request -----------------------------------------------------------------------------

    def _site(self, tree: ModelTree) -> WeightSite:
        layers = self.layers if self.layers is not None else self.default_layers(tree)
        sites = Locator(layers, stack=self.stack).sites(tree.model)
        if len(sites) != 1:
            raise EditError(f"WISE edits one layer, but `layers` names {layers}.")
        return sites[0]

    def _learn(
        self, batch: EditBatch, number: int, entries: Mapping[str, MemoryEntry]
    ) -> tuple[dict[str, Tensor], RequestFigures]:
        """Learns one request; returns the tensors of its entry, and figures."""
        side, tree = self.side, ModelTree.of(self.model, self.stack)
        copy = side.copy_of(number)
        rows = self._in_contexts(batch, self._held(copy, entries) if self.replay else [])
        prompt = self._prompt_mask(tree, rows)
        before = side.change_of(copy, entries)
        site = self._site(tree)
        weights = site.read(self.model).float().reshape(-1)[side.mask(copy)]
        change = torch.zeros_like(before).requires_grad_()
        others = self._other_texts_of(batch.requests[0])
        inputs, outputs, mask = (part[number % len(part)][None] for part in others)
        previous, steps = math.inf, 0
        with replayed(blocks_below(tree, site.layer)):
            while True:
                matrix = side.matrix(copy, before + change)
                with self._changed(site, matrix, prompt) as distances:
                    nll = row_means(target_nll(tree, rows), rows.labels).mean()
                [edited] = distances
                other = activation_distance(
                    outputs, outputs + inputs @ matrix.T, mask, side.activation
                )
                loss = nll + routing_loss(edited, other[0], *self.margins)
                value = float(loss.detach())
                is_learned = value <= self.stop_loss and abs(value - previous) <= 1e-4
                if steps == self.steps or is_learned:
                    break
                (gradient,) = torch.autograd.grad(loss, [change])
                with torch.no_grad():
                    # Of the whole W' only what may change decays.
                    gradient = gradient + self.weight_decay * (weights + before + change)
                    change -= self.lr * gradient
                    change.copy_((before + change).clamp(-self.bound, self.bound) - before)
                previous, steps = value, steps + 1
        figures: RequestFigures = {
            "searched_loss": value,
            "steps": steps,
            "norm": float(torch.linalg.vector_norm(change.detach())),
            "distance": float(edited.detach().min()),
            "distance_other": float(other.detach()),
        }
        return {"changes": change.detach(), "distances": edited.detach().min()}, figures

    def _held(
        self, copy: int, entries: Mapping[str, MemoryEntry]
    ) -> list[tuple[list[int], list[int]]]:
        """Prompts and targets of what a copy has learned, as tokens."""
        tokens = self.tokens
        kept = [
            request
            for entry in entries.values()
            if self.side.copy_of(entry.notes["number"]) == copy
            for request in entry.requests.values()
        ]
        return [
            (
                tokens.prompt(one["prompt"]),
                tokens.target(one["prompt"], one["target"], one.get("glued")),
            )
            for one in kept
        ]

    def _in_contexts(
        self, batch: EditBatch, others: Sequence[tuple[list[int], list[int]]]
    ) -> EditBatch:
        """The request behind each context, and other prompts and targets."""
        [request] = batch.requests
        tokens = self.tokens
        target = tokens.target(request.prompt, request.target_new, request.glued)
        own = [(tokens.prompt(text.format(request.prompt)), target) for text in self.contexts]
        prompts, targets = zip(*own, *others, strict=True)
        rows = EditBatch.from_ids(prompts, targets, tokens)
        return rows.to(batch.input_ids.device)

    def _prompt_mask(self, tree: ModelTree, batch: EditBatch) -> Tensor:
        """Tokens over which D is taken, as the memory will, [B, T] bool."""
        if tree.is_encoder_decoder and self.stack == "decoder":
            mask = torch.zeros_like(batch.labels, dtype=torch.bool)
            mask[:, 0] = True
            return mask
        columns = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        return columns < batch.prompt_lengths[:, None]

    @contextmanager
    def _changed(self, site: WeightSite, matrix: Tensor, mask: Tensor) -> Iterator[list[Tensor]]:
        """Has the layer use W + Δ inside a ``with`` block, and collects D of each pass."""
        distances: list[Tensor] = []

        def change(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            changed = output.float() + plain(args[0]).float() @ matrix.T
            own, other = (t.reshape(len(mask), -1, t.shape[-1]) for t in (output, changed))
            kept = mask[:, : own.shape[1]]  # a pass leaves out the last target token
            distances.append(activation_distance(own, other, kept, self.side.activation))
            return changed.to(output.dtype)

        with hooked({site.module(self.model): change}):
            yield distances

    def _other_texts_of(self, request: EditRequest) -> tuple[Tensor, Tensor, Tensor]:
        """What goes through the layer in texts that have nothing to do with a request."""
        probes = request.locality if self.own_locality else ()
        if not probes:
            return self._other_texts()
        return self._through_layer([statement(p.prompt, p.answer, p.glued) for p in probes])

    def _other_texts(self) -> tuple[Tensor, Tensor, Tensor]:
        """What goes through the layer in the texts of all requests, [L, T, ...]."""
        if self._others is None:
            self._others = self._through_layer(self.other_texts)
        inputs, outputs, kept = (part.to(self.model.device) for part in self._others)
        return inputs, outputs, kept

    def _through_layer(self, texts: Sequence[str] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and outputs of the layer in texts, the model's own if None, and a mask."""
        tree = ModelTree.of(self.model, self.stack)
        if texts is None:
            rows = sample_text_ids(self.model, self.tokens, OTHER_TEXTS, self.seed)
            attended = torch.ones_like(rows)
        else:
            ids = [self.tokens.tokenizer(text)["input_ids"] for text in texts]
            padded = pad_rows(ids, self.tokens.pad_id)
            rows, attended = (part.to(self.model.device) for part in padded)
        given = {"input_ids": rows, "attention_mask": attended}
        if tree.is_encoder_decoder:
            start = self.model.config.decoder_start_token_id
            given["decoder_input_ids"] = torch.full_like(rows[:, :1], start)
        found: list[Tensor] = []

        def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            parts = (plain(args[0]), output)
            found.extend(p.reshape(len(rows), -1, p.shape[-1]).float() for p in parts)

        with torch.no_grad(), hooked({self._site(tree).module(self.model): record}):
            self.model(**given, use_cache=False)
        mask = torch.ones(found[0].shape[:2], dtype=torch.bool, device=rows.device)
        if mask.shape == attended.shape:
            mask = attended.bool()
        return found[0], found[1], mask


def _activation_name(model: nn.Module) -> str:
    """Name of the activation function of a model's MLPs."""
    config = getattr(model, "config", None)
    names = ("hidden_act", "activation_function", "dense_act_fn", "hidden_activation", "activation")
    found = next(
        (value for name in names if isinstance(value := getattr(config, name, None), str)), None
    )
    if found is None:
        raise ModelError(
            f"The configuration of {type(model).__name__} does not name an activation function "
            f"({', '.join(names)}). Choose another model or method."
        )
    return found
