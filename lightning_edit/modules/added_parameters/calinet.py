# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""CaliNET: slots beside the MLPs of a frozen model, trained for a whole set of facts."""

# Shapes: L layers, M maps of the hidden state (one, or two where slots are gated), S slots, D
# hidden, N target tokens.

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_edit.core.batch import IGNORE_INDEX, EditBatch
from lightning_edit.core.errors import EditError, RequestError
from lightning_edit.core.figures import RequestFigures
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.memory import MemoryWrite
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest
from lightning_edit.core.side_memory import MemoryEntry
from lightning_edit.functional.calinet import calibration_score
from lightning_edit.memories.slots import CalibrationSlots
from lightning_edit.modules.added_parameters.contrasts import wrong_relations
from lightning_edit.modules.fine_tuning.loop import AnswerLoss, LightningLoop, OptimizerChoice
from lightning_edit.modules.fitting import EditState
from lightning_edit.modules.memory_based.base import MemoryModule
from lightning_edit.modules.meta_learning.training_batch import TrainOn
from lightning_edit.modules.targets import MemoryTarget, Target
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.replay import blocks_below, replayed
from lightning_edit.passes.target_loss import MAX_ROWS, row_means, target_nll

__all__ = ["CaliNET"]


@dataclass
class _Block:
    """The block that ``fit`` trains, by whose name a resumed run goes on with it.

    Args:
        name: Its name in the memory; none before the first step.
        number: By which its initial keys are drawn.
        taught: What is kept of the requests that it is trained on, by id.
        learned: Its matrices.
    """

    name: str = ""
    number: int = 0
    taught: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    learned: list[nn.Parameter] = field(default_factory=list)

    def edit_state(self) -> EditState:
        return {"block": self.name}

    def load_edit_state(self, state: EditState) -> None:
        self.name = str(state["block"])


# A text, its answer, and whether the answer follows without a space.
_Asked = tuple[str, str, bool | None]


class CaliNET(MemoryModule):
    """Calibrates facts together: a block of slots beside the last MLP is trained for all of them.

    Slots add relu(h Kᵀ) V to the MLP's output, h being its input. V begins at zero, so that fresh
    slots leave every bit; the model is frozen. ``fit`` trains one block by Lightning's own loop,
    epochs over all requests, and a further ``fit`` another one on top of it. ``edit`` trains
    one block for its requests, all rows in each step, with the layers below run once.

    The requests of a block share its slots. To forget or replace some of them, slots are trained
    anew for the others (``remove`` does so); without the editor a block goes as a whole.

    CKA, contrastive knowledge assessment, tells which facts the model has false: P(answer) after
    the prompt over its mean after prompts of wrong relations, ``assess``. With ``false_only``
    only these are trained. To run a model costs as much as S neurons more for each block.

    Args:
        model: Hub id or local folder of a language model, or ``smollm2``, the embedded default.
        layers: Layers with slots; the last one if None. Of an encoder-decoder the decoder's.
        slots: Slots of a block at each layer.
        gated: Slots with a gate, (a(h Gᵀ) ⊙ h Kᵀ) V, as the MLPs have it.
        activation: Activation a, as transformers names it. With ``relu`` slots that do not fire
            add exactly nothing; others are never quite silent.
        train_on: Whether slots are trained on each request's ``prompt``, on its ``rephrase`` texts,
            all of them, or on ``both``.
        false_only: Leave out facts that the model has right by CKA; they are not remembered.
        threshold: CKA below which a fact is false.
        contrast_templates: Wordings of wrong relations, with ``{}`` for the subject; if None, the
            prompts of the other requests of the batch, those of the same relation aside.
        contrast_count: Wrong relations that a fact is compared with, at most.
        lr: Learning rate, constant, of Adafactor with neither scaled parameters nor relative steps.
        steps: Steps of ``edit``, at most; ``fit`` goes by the Trainer's ``max_epochs``.
        stop_loss: Loss in nats below which ``edit`` learns nothing more.
        seed: Seed of K, of which the n-th block draws from seed + n.
        max_entries: Blocks that the memory may hold; any number if None.
        optimizer: Makes the optimizer of the slots, with its own learning rate. Adafactor if None.
        lr_scheduler: Makes a learning rate schedule of the optimizer, one step an epoch of ``fit``.
        end_token: Teach the end token after each answer of a decoder-only model.
        train_mode: Have the model's dropout on while ``fit`` trains.
        kwargs: Arguments of every editor, such as ``dtype``; see
            [`EditModule`][lightning_edit.EditModule].

    Raises:
        EditError: If ``gated`` is asked for, but the model's MLPs are not, or there is no such
            activation.

    References:
        Calibrating Factual Knowledge in Pretrained Language Models, arXiv 2210.03329, sections 2
        and 3.

    Examples:
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> editor = CaliNET.from_model(*trained_tiny_model())
        >>> requests = tiny_requests(3)
        >>> before = editor.assess(requests)
        >>> edit = editor.edit(requests)
        >>> edit
        MemoryWrite(CalibrationSlots: 1 entries)
        >>> edit.apply_(editor.model)
        >>> after = editor.assess(requests)
        >>> all(after[request.id] > 10 * before[request.id] for request in requests)
        True
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2210.03329"
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "FSDP2", "TP", "FSDP2+TP")
    unsaved_arguments: ClassVar[tuple[str, ...]] = ("optimizer", "lr_scheduler")

    def __init__(
        self,
        model: str = "smollm2",
        layers: list[int] | None = None,
        slots: int = 64,
        gated: bool = False,
        activation: str = "relu",
        train_on: TrainOn = "prompt",
        false_only: bool = False,
        threshold: float = 1.0,
        contrast_templates: list[str] | None = None,
        contrast_count: int = 3,
        lr: float = 1e-2,
        steps: int = 100,
        stop_loss: float = 1e-2,
        seed: int = 0,
        max_entries: int | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        end_token: bool = False,
        train_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layers, max_entries=max_entries, **kwargs)
        counts = {"steps": steps, "slots": slots, "contrast_count": contrast_count}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"`{name}` is expected to be at least 1, but got {value}.")
        for text in contrast_templates or ():
            if "{}" not in text:
                raise ValueError(
                    "`contrast_templates` are expected to have {} where the subject goes, but got "
                    f"{text!r}."
                )
        self.slots = slots
        self.gated = gated
        self.activation = activation
        self.train_on: TrainOn = train_on
        self.false_only = false_only
        self.needs_subject = false_only
        self.threshold = threshold
        self.contrast_templates = contrast_templates
        self.contrast_count = contrast_count
        self.lr = lr
        self.steps = steps
        self.stop_loss = stop_loss
        self.seed = seed
        self.loss = AnswerLoss(end_token=end_token)
        self.choice = OptimizerChoice(self._adafactor, optimizer, lr_scheduler)
        self.loop: LightningLoop[MemoryWrite] = LightningLoop(self.choice, train_mode=train_mode)
        self._block = _Block()
        self.parts += [self.loop, self._block]
        self.fit_by(self.loop)

    # -- what it is made of ------------------------------------------------------------------

    @override
    def default_layers(self, tree: ModelTree) -> list[int]:
        return [len(tree.blocks) - 1]

    @override
    def build_memory(self, tree: ModelTree) -> CalibrationSlots:
        from transformers.activations import ACT2FN

        if self.activation not in ACT2FN:
            raise EditError(
                f"transformers knows no activation {self.activation!r}. Choose `relu`, or another "
                f"of {', '.join(ACT2FN)}."
            )
        layers = self.layers if self.layers is not None else self.default_layers(tree)
        layers = sorted({tree.index(layer) for layer in layers})
        for layer in layers:
            readers = tree.mlp_in(layer)
            is_gated = len(readers) > 1 or readers[0].out_features > tree.mlp_out(layer).in_features
            if self.gated and not is_gated:
                raise EditError(
                    f"`gated=True`, but the MLP of layer {layer} of {type(tree.model).__name__} "
                    "has no gate. Set `gated=False`."
                )
        return CalibrationSlots(layers, self.slots, self.gated, self.activation)

    @property
    def side(self) -> CalibrationSlots:
        """The memory of the model."""
        memory = self.memory
        assert isinstance(memory, CalibrationSlots)  # noqa: S101 (what `build_memory` returns)
        return memory

    def initial_slots(self, number: int) -> tuple[Tensor, Tensor]:
        """K and V of a block before it is trained.

        Args:
            number: Number of the block.

        Returns:
            Keys [L, M, S, D], as of a fresh linear layer, and values [L, S, D], zero; float32.
        """
        layers, size = len(self.side.settings["layers"]), self.tree.hidden_size
        generator = torch.Generator().manual_seed(self.seed + number)
        keys = torch.rand(layers, 2 if self.gated else 1, self.slots, size, generator=generator)
        return (2 * keys - 1) / math.sqrt(size), torch.zeros(layers, self.slots, size)

    def _adafactor(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        from transformers.optimization import Adafactor

        settings = {"scale_parameter": False, "relative_step": False}
        adafactor: Optimizer = Adafactor(parameters, lr=self.lr, **settings)
        return adafactor

    @override
    def make_target(self, tree: ModelTree) -> Target[MemoryWrite]:
        return MemoryTarget(tree.model, self.build_memory(tree), self.retrained_without)

    # -- which facts are false ---------------------------------------------------------------

    @torch.no_grad()
    def assess(self, requests: Sequence[EditRequest]) -> dict[str, float]:
        """CKA of each request's new answer, in the model as it stands.

        Args:
            requests: The requests; where there are no ``contrast_templates``, of two relations or
                more.

        Returns:
            Id to CKA, at least 0; the fact is false where it is below ``threshold``.

        Raises:
            RequestError: If there is no wrong relation to compare a request with.
        """
        if not requests:
            return {}
        contrasts = wrong_relations(requests, self.contrast_templates, self.contrast_count)
        asked = [
            (prompt, request.target_new, request.glued)
            for request, others in zip(requests, contrasts, strict=True)
            for prompt in (request.prompt, *others)
        ]
        sizes = [1 + len(others) for others in contrasts]
        with borrowed(self.model):
            found = torch.split(self._log_probabilities(asked), sizes)
        return {
            request.id: float(calibration_score(part[0], part[1:]))
            for request, part in zip(requests, found, strict=True)
        }

    def _log_probabilities(self, asked: Sequence[_Asked]) -> Tensor:
        """Log-probability of each answer after its text, in nats, [rows]."""
        batch = self._batch(asked)
        found: list[Tensor] = []
        for start in range(0, len(batch), MAX_ROWS):
            part = batch.select(range(start, min(start + MAX_ROWS, len(batch))))
            counts = (part.labels != IGNORE_INDEX).sum(1)
            found.append(-counts * row_means(target_nll(self.tree, part), part.labels))
        return torch.cat(found)

    # -- what is learned ---------------------------------------------------------------------

    def _kept(self, request: EditRequest) -> dict[str, object]:
        """What is kept of a request: all that its slots are trained on."""
        kept: dict[str, object] = {"prompt": request.prompt, "target": request.target_new}
        if request.glued is not None:
            kept["glued"] = request.glued
        if self.train_on != "prompt":
            if not request.rephrases:
                raise RequestError(
                    f"Edit request {request.id!r} has no rephrase, on which slots are trained. "
                    "Give it `rephrases`, or set `train_on='prompt'`."
                )
            kept["rephrases"] = list(request.rephrases)
        for text in self._texts(kept):
            target = self.tokens.target(text, request.target_new, request.glued)
            self.tokens.check_length(request, len(self.tokens.prompt(text)), len(target))
        return kept

    def _texts(self, kept: Mapping[str, Any]) -> list[str]:
        rephrases = kept.get("rephrases", [])
        return (
            rephrases if self.train_on == "rephrase" and rephrases else [kept["prompt"], *rephrases]
        )

    def _batch(self, asked: Sequence[_Asked]) -> EditBatch:
        """Texts and their answers as tokens, a row each, on the model's device."""
        batch = EditBatch.from_ids(
            [self.tokens.prompt(text) for text, _, _ in asked],
            [self.tokens.target(*row) for row in asked],
            self.tokens,
        )
        return batch.to(next(self.model.parameters()).device)

    def _encoded(self, taught: Iterable[Mapping[str, Any]]) -> EditBatch:
        """What slots are trained on, a row a text."""
        batch = self._batch(
            [
                (text, kept["target"], kept.get("glued"))
                for kept in taught
                for text in self._texts(kept)
            ]
        )
        return self.loss.ended(batch)

    def encode(self, requests: Sequence[EditRequest]) -> EditBatch:
        """What slots are trained on, a row a text of each request, on the model's device."""
        return self._encoded(self._kept(request) for request in requests)

    def _leaves(self, keys: Tensor, values: Tensor) -> list[nn.Parameter]:
        """Matrices to be trained, [S, D] each: for each layer its keys, then its values."""
        device = next(self.model.parameters()).device
        return [
            nn.Parameter(matrix.detach().to(device, torch.float32, copy=True))
            for own_keys, own_values in zip(keys, values, strict=True)
            for matrix in (*own_keys, own_values)
        ]

    def _layers_of(self, matrices: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Keys [M, S, D] and values [S, D] of each layer."""
        size = 3 if self.gated else 2
        parts = [matrices[i : i + size] for i in range(0, len(matrices), size)]
        return [(torch.stack(list(part[:-1])), part[-1]) for part in parts]

    def _entry(
        self, matrices: Sequence[Tensor], taught: Mapping[str, Mapping[str, Any]], number: int
    ) -> MemoryEntry:
        layers = [(k.detach(), v.detach()) for k, v in self._layers_of(matrices)]
        tensors = {
            "keys": torch.stack([keys for keys, _ in layers]).clone(),
            "values": torch.stack([values for _, values in layers]).clone(),
        }
        return MemoryEntry(tensors, dict(taught), {"number": number})

    @contextmanager
    def _added(self, slots: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Has slots beside the MLPs, on top of any others, inside a ``with`` block."""
        handles = self.side.add_slots(self.model, slots)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _only(self, entries: Mapping[str, MemoryEntry]) -> Iterator[None]:
        """Has the slots of these entries and no others inside a ``with`` block."""
        blocks = [entry.tensors for entry in entries.values()]
        slots = [
            (
                torch.cat([b["keys"][i] for b in blocks], 1),
                torch.cat([b["values"][i] for b in blocks]),
            )
            for i in range(len(self.side.settings["layers"]) if blocks else 0)
        ]
        with self.memory.off():
            if not slots:
                yield
                return
            with self._added(slots):
                yield

    def _train(
        self,
        taught: Mapping[str, Mapping[str, Any]],
        others: Mapping[str, MemoryEntry],
        number: int,
    ) -> tuple[MemoryEntry, int]:
        """Trains a block for requests beside other blocks; returns it, and the steps."""
        device = next(self.model.parameters()).device
        exact = torch.autocast(device.type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), exact:
            batch = self._encoded(taught.values())
            parts = math.ceil(len(batch) / MAX_ROWS)
            seen: list[dict[nn.Module, Any]] = [{} for _ in range(parts)]
            below = blocks_below(self.tree, min(self.side.settings["layers"]))
            learned = self._leaves(*self.initial_slots(number))
            optimizer = self.choice.make(learned)
            steps = 0
            while steps < self.steps:
                total = 0.0
                optimizer.zero_grad()
                for part in range(parts):
                    added = self._added(self._layers_of(learned))
                    with self._only(others), added, replayed(below, seen[part]):
                        loss = self.loss(self.tree, batch, Processes(part, parts)) / parts
                    gradients = torch.autograd.grad(loss, learned)
                    for matrix, gradient in zip(learned, gradients, strict=True):
                        matrix.grad = gradient if matrix.grad is None else matrix.grad + gradient
                    total += float(loss.detach())
                if total < self.stop_loss:
                    break
                optimizer.step()
                steps += 1
        return self._entry(learned, taught, number), steps

    # -- edits -------------------------------------------------------------------------------

    def retrained_without(self, request_ids: Sequence[str]) -> dict[str, MemoryEntry]:
        """What the memory holds beside some requests; slots that they shared are trained anew."""
        left: dict[str, MemoryEntry] = {}
        shared: list[str] = []
        for name, entry in self.memory.entries.items():
            others = {r: kept for r, kept in entry.requests.items() if r not in request_ids}
            if others:
                left[name] = replace(entry, requests=others)
            if 0 < len(others) < len(entry.requests):
                shared.append(name)
        for i, name in enumerate(shared):
            beside = {n: entry for n, entry in left.items() if n not in shared[i:]}
            entry = left[name]
            left[name], _ = self._train(entry.requests, beside, entry.notes["number"])
        return left

    @override
    def compute_edit(self, batch: EditBatch) -> MemoryWrite:
        entries = self.retrained_without([request.id for request in batch.requests])
        rows: dict[str, RequestFigures] = {r.id: {"id": r.id, "steps": 0} for r in batch.requests}
        if self.false_only:
            with self._only(entries):
                for name, score in self.assess(batch.requests).items():
                    rows[name]["cka"] = score
        taught = {r.id: self._kept(r) for r in batch.requests if self._is_false(rows[r.id])}
        norm = 0.0
        if taught:
            name = self.entry_id(next(iter(taught)), entries)
            number = self.next_number(entries)
            self.check_budget({**entries, name: MemoryEntry({}, {})})
            entries[name], steps = self._train(taught, entries, number)
            norm = float(torch.linalg.vector_norm(entries[name].tensors["values"]))
            for request_id in taught:
                rows[request_id] |= {"block": name, "steps": steps}
        edit = self.memory_write(entries)
        edit.details["requests"] = [
            {**rows[request.id], "norm": norm if request.id in taught else 0.0}
            for request in batch.requests
        ]
        return edit

    def _is_false(self, row: RequestFigures) -> bool:
        return not self.false_only or row["cka"] < self.threshold

    # -- fit ---------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Begins another block, unless a checkpoint says otherwise."""
        self._block.name, self._block.taught = "", {}

    def tuned_parameters(self) -> list[nn.Parameter]:
        """The matrices of the block that ``fit`` trains."""
        self._block.learned = self._leaves(*self.initial_slots(0))
        return list(self._block.learned)

    def before_steps(self) -> None:
        """Begins with the block that a checkpoint names, or with a fresh one."""
        entries, block = self.memory.entries, self._block
        if block.name in entries:
            entry = entries[block.name]
            block.number, block.taught = entry.notes["number"], dict(entry.requests)
            start = entry.tensors["keys"], entry.tensors["values"]
        else:
            self.check_budget({**entries, "": MemoryEntry({}, {})})
            block.name, block.taught = "", {}
            block.number = self.next_number(entries)
            start = self.initial_slots(block.number)
        with torch.no_grad():
            for parameter, matrix in zip(block.learned, self._leaves(*start), strict=True):
                parameter.copy_(matrix)

    def step_loss(self, requests: list[EditRequest], processes: Processes) -> Tensor | None:
        """The loss of the block on what it is taught of some requests, in nats.

        Slots are no parameters of the model, whose gradients a strategy would average: each process
        learns from all requests.
        """
        self._admit([request for request in requests if request.id not in self._block.taught])
        taught = [request for request in requests if request.id in self._block.taught]
        if not taught:
            return None
        for request in taught:
            self.loop.row(request)["steps"] += 1
        with self._only(self._others()), self._added(self._layers_of(self._block.learned)):
            batch = self.encode(taught)
            return self.loss(self.tree, batch)

    def after_fit(self) -> None:
        """Nothing: the block is in the memory after each step."""

    def _others(self) -> dict[str, MemoryEntry]:
        """The blocks that are not being trained."""
        return {name: e for name, e in self.memory.entries.items() if name != self._block.name}

    def _admit(self, requests: Sequence[EditRequest]) -> None:
        """Takes requests into the block, if need be out of others, and only if they are false."""
        known = self.memory.requests
        again = [request.id for request in requests if request.id in known]
        if again:
            self.memory.write(self.retrained_without(again))
        unknown = [request for request in requests if "cka" not in self.loop.rows[request.id]]
        if self.false_only and unknown:
            with self._only(self._others()):
                for name, score in self.assess(requests).items():
                    self.loop.rows[name]["cka"] = score
        for request in requests:
            if self._is_false(self.loop.rows[request.id]):
                self._block.taught[request.id] = self._kept(request)

    def after_step(self) -> None:
        """Writes the block that is being trained into the memory."""
        if not self._block.taught:
            return
        entries = self.memory.entries
        self._block.name = self._block.name or self.entry_id(
            next(iter(self._block.taught)), entries
        )
        entries[self._block.name] = self._entry(
            self._block.learned, self._block.taught, self._block.number
        )
        self.memory.write(entries)
