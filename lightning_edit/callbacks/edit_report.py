# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The run folder: the edit as an artefact, and what it did, for people and programs."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_edit.callbacks.before_run import BeforeRun
from lightning_edit.callbacks.edit_evaluator import EditEvaluator, metric_rows
from lightning_edit.callbacks.model_access import find_model
from lightning_edit.callbacks.retention_curve import RetentionCurve
from lightning_edit.callbacks.run_folder import hold, is_dry, run_folder
from lightning_edit.core.arguments import CheckedArguments
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.edit import Edit
from lightning_edit.core.errors import ArtifactError, ModelError
from lightning_edit.core.figures import RequestFigures, not_taken
from lightning_edit.core.files import clean_up
from lightning_edit.core.provenance import Provenance
from lightning_edit.core.request import EditRequest, is_question
from lightning_edit.core.side_memory import EditMemory
from lightning_edit.data.loader import requests_sha256
from lightning_edit.evaluation.evaluator import Evaluation, ScoredProbe, probe_scores
from lightning_edit.evaluation.measured import metric_values
from lightning_edit.functional.matching import completion_matches, contains_answer
from lightning_edit.metrics import edit_metrics
from lightning_edit.metrics.reading import default_readings
from lightning_edit.modules.base import EditModule
from lightning_edit.rendering.terminal import spell_out
from lightning_edit.report import metrics_table, write_results
from lightning_edit.report.files import FILES as REPORT_FILES
from lightning_edit.report.files import is_foreign_card
from lightning_edit.report.results import EditRow, ProbeRow, RunReport, plain
from lightning_edit.report.undo import apply_commands

__all__ = ["EditReport"]

PACKAGES = ("lightning-edit", "torch", "lightning", "transformers", "torchmetrics", "peft")
# What a run writes into its folder; an earlier run's are moved aside.
FILES = ("delta", *REPORT_FILES)


class EditReport(CheckedArguments, Callback):
    """Writes the run folder at the end of a verb and prints the table of the metrics.

    The folder holds the edit (``delta/``), ``results.json``, ``edits.jsonl``, ``report.html``,
    ``report.md`` and a card. Metrics come from the [`EditEvaluator`][lightning_edit.EditEvaluator]
    of the same Trainer, the curve over a sequence of edits from its
    [`RetentionCurve`][lightning_edit.RetentionCurve] as well. ``validate`` and ``test`` of an
    editor, which measure by themselves, leave the same but the edit in the folders ``validate/``
    and ``test/`` of it. Files of an earlier run are kept in ``earlier/``.

    Args:
        dirpath: The folder; the Trainer's log or root folder when None.
        save_delta: Write the edit itself. Of a module that is no editor it is what its trainable
            weights have changed by; they lie in memory once more meanwhile, and in checkpoints.
        originals: Keep the original tensors with the edit, so that it can be undone exactly in a
            copy of the edited model.

    Examples:
        >>> EditReport(dirpath="runs/edit").dirpath
        'runs/edit'
    """

    def __init__(
        self, dirpath: str | None = None, save_delta: bool = True, originals: bool = True
    ) -> None:
        self.dirpath = dirpath
        self.save_delta = save_delta
        self.originals = originals
        self.report: RunReport | None = None
        self._before = BeforeRun(type(self).__name__)
        self._began = 0.0
        self._earlier = 0.0  # seconds of edits that were made before a run was resumed

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts the clock, before other callbacks measure the unedited model."""
        self._began, self._earlier = time.perf_counter(), 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what is about to be edited, and moves an earlier run's files aside."""
        folder = run_folder(trainer, self.dirpath)
        hold(trainer, folder)
        if trainer.is_global_zero and not is_dry(trainer):
            clean_up(folder / "delta")
        if isinstance(pl_module, EditModule):
            rank_zero_info(_banner(pl_module, trainer))
            self._earlier = sum(row.get("seconds", 0.0) for row in pl_module.history)
        if trainer.is_global_zero and not is_dry(trainer) and trainer.ckpt_path is None:
            _move_aside(folder)
        if not self.save_delta or isinstance(pl_module, EditModule):
            return
        if trainer.ckpt_path is not None and not self._before.is_loaded:
            self._before.forget()
            return
        try:
            self._before.begin(_foreign_model(trainer, pl_module))
        except ModelError as error:
            rank_zero_info("The report will have no edit. %s", error)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]
    ) -> None:
        self._before.save(lambda: _foreign_model(trainer, pl_module), checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]
    ) -> None:
        self._before.load(checkpoint)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the folder and prints the table."""
        folder = run_folder(trainer, self.dirpath)
        callbacks: list[Callback] = getattr(trainer, "callbacks", [])
        evaluators = [c for c in callbacks if isinstance(c, EditEvaluator)]
        for evaluator in evaluators:
            evaluator.finish(pl_module)
        curves = [c for c in callbacks if isinstance(c, RetentionCurve)]
        for curve in curves:
            curve.finish(trainer, pl_module)
        if is_dry(trainer):
            return
        # By every process, since sharded weights are gathered by all of them together.
        delta: Edit | None = None
        if isinstance(pl_module, EditModule):
            delta = pl_module.committed()
            pl_module.fitting.finish(pl_module)
        elif self._before.weights is not None:
            model = _foreign_model(trainer, pl_module)
            ids = [request.id for e in evaluators[:1] for request in e.requests]
            settings = {"epochs": trainer.current_epoch, "steps": trainer.global_step}
            base = self._before.weights.info(model)
            delta = self._before.weights.edit(model)
            delta.provenance = Provenance(
                type(pl_module).__name__, "", dict(settings), base, tuple(ids)
            )
        if not trainer.is_global_zero:
            return
        saved = delta is not None and self.save_delta
        if delta is not None and saved:
            delta.save(folder / "delta", originals=self.originals)
        self.report = self._build(pl_module, delta, evaluators, curves, saved=saved)
        files = [name for name in REPORT_FILES if not is_foreign_card(folder / name)]
        write_results(self.report, folder, files)
        self._show(folder, saved)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what ``validate`` has measured."""
        if trainer.state.fn == "validate":  # not one inside of `fit`
            self._report_verb(trainer, pl_module, "validate")

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what ``test`` has measured."""
        self._report_verb(trainer, pl_module, "test")

    def _report_verb(self, trainer: Trainer, pl_module: LightningModule, verb: str) -> None:
        folder = run_folder(trainer, self.dirpath) / verb
        if not isinstance(pl_module, EditModule) or is_dry(trainer):
            return
        measured = pl_module.measured.whole()
        if not trainer.is_global_zero:
            return
        hold(trainer, folder)
        _move_aside(folder)
        before, after = Evaluation(measured.before), Evaluation(measured.after)
        readings = pl_module.evaluator.readings
        values = [metric_values(scores, readings) for scores in (before, after)]
        notes = []
        if (
            verb == "validate"
            and not pl_module.unedited.is_other
            and measured.before == measured.after
        ):
            notes.append(
                "The model was compared with itself: the editor knows of no edit in it. Name the "
                "model as it was before with the editor's `baseline`."
            )
            rank_zero_info(notes[0])
        self.report = self._report(
            pl_module,
            measured.requests,
            metrics=metric_rows(*values),
            edits=_edit_rows(measured.requests, before, after, measured.figures, None),
            settings=plain(pl_module.provenance.settings),
            seconds={"edit": sum(row.get("seconds", 0.0) for row in measured.figures)},
            notes=notes,
            artifact="",
        )
        write_results(self.report, folder)
        self._show(folder, saved=False)

    def _build(
        self,
        pl_module: LightningModule,
        delta: Edit | None,
        evaluators: list[EditEvaluator],
        curves: list[RetentionCurve],
        *,
        saved: bool,
    ) -> RunReport:
        evaluator = evaluators[0] if evaluators else None
        if evaluator is None:
            rank_zero_warn(
                "EditReport has no metrics to report: add EditEvaluator to the Trainer's callbacks."
            )
        requests = evaluator.requests if evaluator else []
        history = pl_module.history if isinstance(pl_module, EditModule) else []
        edits: list[EditRow] = []
        if evaluator and evaluator.before and evaluator.after:
            edits = _edit_rows(requests, evaluator.before, evaluator.after, history, delta)
        return self._report(
            pl_module,
            requests,
            metrics=evaluator.rows if evaluator else {},
            delta=delta,
            edits=edits,
            not_taken=not_taken(list({row["id"]: row for row in history}.values())),
            settings=delta.provenance.settings if delta else {},
            layers=_layers(delta),
            seconds={
                "edit": sum(row.get("seconds", 0.0) for row in history),
                "evaluate": sum(e.seconds for e in evaluators),
            },
            # The page draws the first few curves: retention before what is measured anyway.
            sequence=_points(
                *(c.sequence for c in curves), evaluator.sequence if evaluator else []
            ),
            artifact="delta" if saved else "",
            artifact_class=type(delta).__name__ if saved else "WeightDelta",
        )

    def _report(
        self,
        pl_module: LightningModule,
        requests: list[EditRequest],
        *,
        seconds: dict[str, float],
        delta: Edit | None = None,
        **more: Any,
    ) -> RunReport:
        """A report with what is the same in all of them."""
        model: dict[str, object] = {}
        if isinstance(pl_module, EditModule):
            model = asdict(pl_module.base)
        elif delta is not None:
            model = asdict(delta.provenance.base)
        return RunReport(
            method=type(pl_module).__name__,
            paper=getattr(pl_module, "paper", ""),
            model=model,
            requests_sha256=requests_sha256(requests) if requests else "",
            versions=_versions(),
            seconds={"total": self._earlier + time.perf_counter() - self._began, **seconds},
            peak_memory_bytes=_peak_memory(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            **more,
        )

    def _show(self, folder: Path, saved: bool) -> None:
        if self.report is None:
            return
        try:
            from rich.console import Console

            spell_out(sys.stdout)
            Console().print(metrics_table(self.report, "rich"))
        except ImportError:
            rank_zero_info("%s", metrics_table(self.report, "md"))
        rank_zero_info(f"Saved  {folder}: report.html, results.json, edits.jsonl, README.md")
        if saved:
            delta = str((folder / "delta").resolve())  # works in every folder
            apply, undo = apply_commands(replace(self.report, artifact=delta)).split("\n", 1)
            rank_zero_info(f"Apply  {apply}")
            rank_zero_info(f"Undo   {undo}  # bit for bit")


def _foreign_model(trainer: Trainer, pl_module: LightningModule) -> Any:
    """The language model that is trained, where need be the one that an evaluator names."""
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    named = [c.model_attribute for c in callbacks if isinstance(c, EditEvaluator)]
    return find_model(pl_module, named[0] if named else None)


def _banner(pl_module: EditModule, trainer: Trainer) -> str:
    names = list(pl_module.edit_optimizer.originals)
    memory = EditMemory.find(pl_module.model)
    size = sum(t.numel() for t in pl_module.edit_optimizer.originals.values())
    share = size / max(1, pl_module.base.parameters)
    requests = getattr(getattr(trainer, "datamodule", None), "requests", [])
    where = names[0] if len(names) == 1 else f"{len(names)} parameters"
    where = f"{where} ({size:,} weights, {share:.1%})"
    if memory is not None:
        where = f"{type(memory).__name__} of {len(memory)} entries"
    return (
        f"{type(pl_module).__name__} · {pl_module.model_id} ({pl_module.base.sha256[:12]}…) · "
        f"{len(requests)} {'request' if len(requests) == 1 else 'requests'} · {where}"
    )


def _move_aside(folder: Path) -> None:
    """Keeps the files of an earlier run in ``earlier/``; refuses those that are of no run."""
    old = [path for name in FILES if (path := folder / name).exists() and not is_foreign_card(path)]
    if not any(path.name in ("results.json", "delta") for path in old):
        others = [path.name for path in old if path.name != "README.md"]
        if others:
            raise ArtifactError(
                f"`{folder}` holds {', '.join(others)}, which the report of this run would "
                "replace, but no results.json, so that they are of no earlier run. Give "
                "EditReport another `dirpath`, or move them elsewhere."
            )
        return
    stamp = datetime.fromtimestamp(max(p.stat().st_mtime for p in old), UTC)
    name = f"{stamp:%Y%m%d-%H%M%S}"
    count = len(list(folder.glob(f"earlier/{name}*")))
    earlier = folder / "earlier" / (f"{name}-{count + 1}" if count else name)
    earlier.mkdir(parents=True)
    for path in old:
        os.replace(path, earlier / path.name)


def _edit_rows(
    requests: list[EditRequest],
    before: Evaluation,
    after: Evaluation,
    history: list[RequestFigures],
    delta: Edit | None,
) -> list[EditRow]:
    figures = {row["id"]: row for row in history}
    size = 0.0
    if isinstance(delta, WeightDelta):
        size = math.hypot(*(_norm(tensor) for tensor in delta.originals.values()))
    readings = default_readings(in_chat=True)
    every = map(str, edit_metrics(readings=readings, likelihoods=True))
    keys = [key for key in every if key.count("/") == 1]
    rows = []
    for request in requests:
        old, new = list(before.of(request.id)), list(after.of(request.id))
        own = figures.get(request.id, RequestFigures()).copy()
        own.pop("id", None)
        norm = own.pop("norm", None)
        rows.append(
            EditRow(
                id=request.id,
                prompt=request.prompt,
                subject=request.subject,
                target_new=request.target_new,
                target_old=request.target_old,
                before_text=old[0].text,
                after_text=new[0].text,
                before=_scores(old, keys),
                after=_scores(new, keys),
                norm=norm,
                relative_norm=norm / size if norm is not None and size else None,
                seconds=own.pop("seconds", None),
                diagnostics=own,
                probes=tuple(_probe_row(b, a) for b, a in zip(old[1:], new[1:], strict=True)),
            )
        )
    return rows


def _points(*sequences: list[dict[str, float]]) -> list[dict[str, float]]:
    """Points of several curves, those after the same number of edits or steps as one."""
    points: dict[tuple[bool, float], dict[str, float]] = {}
    for point in (point for sequence in sequences for point in sequence):
        place = ("step" in point, point.get("step", point.get("edits", 0.0)))
        points.setdefault(place, {}).update(point)
    return [points[place] for place in sorted(points)]


def _scores(probes: list[ScoredProbe], keys: list[str]) -> dict[str, float | None]:
    scores: dict[str, float | None] = {}
    for key in keys:
        known = probe_scores(probes, key)
        if known:
            scores[key] = sum(known) / len(known)
    return scores


def _probe_row(before: ScoredProbe, after: ScoredProbe) -> ProbeRow:
    is_locality = after.metric == "locality"
    unchanged = after.autoregressive if after.autoregressive is not None else after.exact
    return ProbeRow(
        role=after.metric,
        kind=after.kind,
        prompt=after.prompt,
        answer=after.answers[0] if after.answers else "",
        before_text=before.text,
        after_text=after.text,
        teacher_forced=after.teacher_forced,
        autoregressive=after.autoregressive,
        stated=after.stated,
        unchanged=unchanged if is_locality else None,
        lost=_is_lost(before, after) if is_locality else None,
    )


def _is_lost(before: ScoredProbe, after: ScoredProbe) -> bool | None:
    """Whether a neighbor's right answer is gone; None where it was not given, or is not known."""
    asks, answers = is_question(before.prompt), [a for a in before.answers if a.strip()]
    judge = contains_answer if asks else completion_matches
    if not answers or not before.text or not judge(before.text, answers):
        return None
    return not judge(after.text, answers)


def _layers(delta: Edit | None) -> dict[str, dict[str, float | None]]:
    if not isinstance(delta, WeightDelta):
        return {}
    layers: dict[str, dict[str, float | None]] = {}
    for name, norm in delta.norms().items():
        whole = _norm(delta.originals[name])
        layers[name] = {"norm": norm, "relative_norm": norm / whole if whole else None}
    return layers


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _peak_memory() -> int | None:
    """Most memory held at a time, in bytes; None where the system does not tell, as on Windows."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
