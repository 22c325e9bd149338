# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Finds out before an edit which layers bring a fact back when its subject is corrupted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_edit.callbacks.model_access import find_requests, model_and_tokens
from lightning_edit.callbacks.run_folder import is_dry, run_folder
from lightning_edit.core.arguments import CheckedArguments
from lightning_edit.core.errors import MissingDependencyError
from lightning_edit.core.locator import ModelTree
from lightning_edit.core.request import EditRequest, check_requests
from lightning_edit.tracing.causal_tracing import (
    POSITIONS,
    FactTrace,
    TracingResult,
    TracingSettings,
    propose_layers,
    subject_deviation,
    trace_facts,
)
from lightning_edit.tracing.heat_map import plot_tracing
from lightning_edit.tracing.restoration import Kind

__all__ = ["CausalTracing"]

# Where facts are recalled and where they are fetched (section 2.2 of the paper).
SITES: tuple[tuple[Kind, str, str], ...] = (
    ("hidden", "hidden state", "last subject token"),
    ("mlp", "MLPs", "last subject token"),
    ("attention", "attentions", "last token"),
)


class CausalTracing(CheckedArguments, Callback):
    """Traces the known facts before ``fit``'s first step or ``validate``, and proposes layers.

    Works with an editor and with any LightningModule that holds a Hugging Face model and its
    tokenizer, in the Trainer's precision. Only facts count whose ``target_old`` the model gives.
    Under several processes each traces its share of them. Writes ``causal_tracing.json`` and, with
    matplotlib, the heat maps ``causal_tracing.png``. A resumed fit, whose model is changed
    already, is not traced again.

    Args:
        requests: Facts to trace; the requests of the Trainer's datamodule when None.
        limit: Trace the first so many requests; all when None.
        samples: Noisy copies of a prompt.
        noise_factor: Standard deviation of the noise as a multiple of that of the embeddings of
            the subjects' tokens.
        window: Layers whose MLP or attention outputs are restored together.
        count: How many layers to propose.
        seed: Seed of the noise.
        max_rows: Rows of a batch at most, as far as the samples allow.
        dirpath: Folder of the files; the Trainer's log or root folder when None.
        model_attribute: Attribute of the LightningModule that holds the model; found by its type
            when None.

    Examples:
        >>> CausalTracing(samples=5).settings.window
        10

    References:
        Locating and Editing Factual Associations in GPT, arXiv 2202.05262, section 2.
    """

    def __init__(
        self,
        requests: list[EditRequest] | None = None,
        limit: int | None = 100,
        samples: int = 10,
        noise_factor: float = 3.0,
        window: int = 10,
        count: int = 5,
        seed: int = 0,
        max_rows: int = 1024,
        dirpath: str | None = None,
        model_attribute: str | None = None,
    ) -> None:
        if requests is not None:
            check_requests(requests)
        self.given = requests
        self.limit = limit
        self.settings = TracingSettings(samples, noise_factor, window, seed, max_rows)
        self.count = count
        self.dirpath = dirpath
        self.model_attribute = model_attribute
        #: The traces, on every process.
        self.result: TracingResult | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After checkpoints are restored: traces the unedited model."""
        if trainer.global_step:
            rank_zero_info("CausalTracing leaves a resumed run out: its model is changed already.")
            return
        self._trace(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Under ``validate``: traces the model as it stands."""
        if trainer.state.fn == "validate":
            self._trace(trainer, pl_module)

    def _trace(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model, tokens = model_and_tokens(pl_module, self.model_attribute, "CausalTracing")
        requests = find_requests(trainer, self.given, "CausalTracing")[: self.limit]
        folder = run_folder(trainer, self.dirpath)
        subjects = [request.subject for request in requests]
        rank, world = trainer.global_rank, trainer.world_size
        rank_zero_info(f"Tracing {len(requests)} facts")  # which takes a while
        with trainer.precision_plugin.forward_context():
            # The noise is that of all facts, whoever traces them.
            deviation = subject_deviation(ModelTree.of(model), tokens, subjects)
            share = requests[rank::world]
            mine = trace_facts(model, tokens, share, self.settings, deviation=deviation)
        self.result = result = _gather(mine, requests, world)
        rank_zero_info(_summary(result, self.count))
        if trainer.is_global_zero and not is_dry(trainer):
            self._write(folder, result)

    def _write(self, folder: Path, result: TracingResult) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        proposed = _proposed(result, self.count)
        text = json.dumps({"proposed_layers": proposed, **result.to_dict()}, ensure_ascii=False)
        (folder / "causal_tracing.json").write_text(text + "\n", encoding="utf-8")
        files = "causal_tracing.json"
        if result.facts:
            try:
                plot_tracing(result).savefig(folder / "causal_tracing.png")
                files += ", causal_tracing.png"
            except MissingDependencyError as error:
                rank_zero_info(str(error))
        rank_zero_info(f"Saved  {folder}: {files}")


def _proposed(result: TracingResult, count: int) -> list[int]:
    if not result.facts:
        return []
    layers = result.facts[0].scores["mlp"].shape[1]
    return propose_layers(result, min(count, layers))


def _summary(result: TracingResult, count: int) -> str:
    facts = result.facts
    known = f"CausalTracing · {len(facts)} of {len(facts) + len(result.unknown)} facts known"
    if not facts:
        return f"{known}; give some whose `target_old` the model says"
    high, low = (sum(getattr(f, name) for f in facts) / len(facts) for name in ("high", "low"))
    lines = [f"{known} · p(answer) {high:.3f}, with the subject corrupted {low:.3f}"]
    for kind, what, position in SITES:
        effects_L = result.average(kind)[POSITIONS.index(position)]
        layer = int(effects_L.argmax())
        peak = float(effects_L[layer])
        lines.append(f"  {what:<12}  {peak:+.3f} at the {position}, layer {layer}")
    return "\n".join([*lines, f"Layers to try  {_proposed(result, count)}"])


def _gather(mine: TracingResult, requests: Sequence[EditRequest], world: int) -> TracingResult:
    """The traces of all processes, in the order of the requests."""
    if world == 1:
        return mine
    parts: list[tuple[list[FactTrace], list[str]]] = [([], [])] * world
    torch.distributed.all_gather_object(parts, (mine.facts, mine.unknown))
    order = {request.id: i for i, request in enumerate(requests)}
    facts = sorted((f for facts, _ in parts for f in facts), key=lambda f: order[f.id])
    unknown = sorted((i for _, ids in parts for i in ids), key=order.__getitem__)
    return TracingResult(facts, unknown, mine.deviation, mine.settings)
