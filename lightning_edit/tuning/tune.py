# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""``tune``: settings of a method for a model, chosen by rules and measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import lightning_edit
from lightning_edit.benchmark.compare import run_study, study_of
from lightning_edit.benchmark.engine import Engine
from lightning_edit.benchmark.specs import DataSpec, MethodSpec, Study
from lightning_edit.benchmark.store import ResultsFolder, need_pandas
from lightning_edit.core.errors import EditError
from lightning_edit.data.base import EditDataModule
from lightning_edit.data.facts import Facts
from lightning_edit.modules.base import DType
from lightning_edit.modules.locate_then_edit.base import LocateModule
from lightning_edit.presets import load_preset, presets_of
from lightning_edit.report.text import number
from lightning_edit.tuning.preset import write_preset
from lightning_edit.tuning.rules import Axis, ModelAtHand, axes_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["tune"]

METRICS = ("reliability", "generality", "locality")
READINGS = ("teacher_forced", "autoregressive")
SEARCHED, HELD_OUT = "searched", "held out"
OWN, SHIPPED, TUNED = "the class's own", "the shipped preset's", "tuned"


@dataclass(frozen=True)
class _Candidate:
    """Settings that were measured."""

    label: str
    settings: Mapping[str, object]
    rates: Mapping[tuple[str, str], float]

    @property
    def score(self) -> float:
        """Harmonic mean of the metrics, each the mean of its readings."""
        found = [sum(self.rates.get((m, r), 0.0) for r in READINGS) / 2 for m in METRICS]
        return len(found) / sum(1 / rate for rate in found) if min(found) > 0 else 0.0


def tune(
    model: str = "smollm2",
    methods: Sequence[str] = ("ROME", "MEMIT", "AlphaEdit"),
    data: EditDataModule | None = None,
    facts: int = 10,
    out: str = "runs/tune",
    seed: int = 0,
    dtype: DType = "float32",
    max_new_tokens: int = 24,
    accelerator: str = "auto",
    cache_dir: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Chooses the settings of locate-then-edit methods for a model, and writes them as presets.

    One setting after another, the best so far kept: layers by the method's rule of depth, by causal
    tracing of facts that the model knows, and a little above; the share of a pair that is written,
    which stands for λ; the clamp in parts of ‖v‖; more sampled contexts. Best is the harmonic mean
    of reliability, generality and locality, each the mean of both readings. What was chosen is
    then measured on as many other facts, beside the class's own settings and the shipped preset's.

    Each candidate is a cell of [`compare`][lightning_edit.compare] in ``out``: measured once, and
    gone on with after an interruption. ``out`` holds a preset a method, ``memit.yaml`` and so on,
    whose comments are the measured table.

    Args:
        model: Hub id, local folder or GGUF file of a decoder-only model, or ``smollm2``.
        methods: Names of locate-then-edit methods.
        data: Facts with ``target_old``, ``rephrases`` and ``locality``; the package's own if None.
        facts: How many to search by, and how many others to measure the choice by, of those that
            the model knows.
        out: Folder of the presets and of all that was measured.
        seed: Of all that is drawn.
        dtype: Precision of the model's weights.
        max_new_tokens: Longest continuation that is read, in tokens.
        accelerator: Of Lightning's Trainer, in which each candidate is measured.
        cache_dir: Folder for converted models and statistics; ``~/.cache/lightning_edit`` if None.
        progress: Show a bar over the candidates.

    Returns:
        A row a candidate: ``method``, ``data`` (``searched`` or ``held out``), ``label``,
        ``settings``, a column a metric and reading, ``score``.

    Raises:
        EditError: If a method is none of these, or the model knows none of the facts.
        MissingDependencyError: If pandas or pyarrow is not installed.

    Examples:
        >>> from lightning_edit import EditDataModule
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> folder = getfixture("tmp_path")
        >>> model, tokenizer = trained_tiny_model()
        >>> _ = model.save_pretrained(folder / "model"), tokenizer.save_pretrained(folder / "model")
        >>> frame = tune(
        ...     str(folder / "model"),
        ...     methods=["ROME"],
        ...     data=EditDataModule(requests=tiny_requests(4)),
        ...     facts=1,
        ...     out=str(folder / "tuned"),
        ...     progress=False,
        ... )
        >>> (folder / "tuned" / "rome.yaml").is_file(), frame["label"].tolist()[-1]
        (True, 'tuned')
    """
    need_pandas()
    import pandas as pd

    classes = {name: _class(name) for name in methods}
    if facts < 1:
        raise EditError(f"`facts` is expected to be at least 1, but got {facts}.")
    searched, held_out = _halves(Facts() if data is None else data, facts)
    study = study_of(
        methods=["ROME"],
        data=[searched, held_out],
        seeds=[seed],
        model=model,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        accelerator=accelerator,
        cache_dir=cache_dir,
    )
    search = _Search(study, Path(out), progress=progress)
    at = search.model_at_hand()
    for name, cls in classes.items():
        # Before a candidate is measured: afterwards the model is another copy.
        axes = list(axes_of(cls, at, seed))
        search.run(name, axes)
    return pd.DataFrame(search.rows)


class _Search:
    """Goes from setting to setting, and keeps what it measured.

    Args:
        study: What all candidates share: model, data, seed.
        out: Folder of the results.
        progress: Show a bar over the candidates.
    """

    def __init__(self, study: Study, out: Path, *, progress: bool) -> None:
        self.study = study
        self.out = out
        self.progress = progress
        #: A row a candidate.
        self.rows: list[dict[str, object]] = []

    def model_at_hand(self) -> ModelAtHand:
        engine = Engine(self.study, ResultsFolder(self.out))
        known = engine.unedited(self.study.data[0]).requests
        engine.unedited(self.study.data[1])  # says before the search if there is none
        return ModelAtHand(engine.model, engine.tokenizer, known)

    def run(self, method: str, axes: Sequence[Axis]) -> None:
        """Chooses a method's settings and writes its preset."""
        chosen: dict[str, tuple[object, str]] = {}
        for axis in axes:
            settings = {name: value for name, (value, _) in chosen.items()}
            tried = {f"{axis.name} {_short(v)}": settings | {axis.name: v} for v in axis.values}
            best = max(self.measure(method, tried, SEARCHED, axis.name), key=lambda one: one.score)
            chosen[axis.name] = (best.settings[axis.name], axis.reason)
        chosen = {name: told for name, told in chosen.items() if told[0] is not None}
        settings = {name: value for name, (value, _) in chosen.items()}
        finals: dict[str, Mapping[str, object]] = {OWN: {}}
        if self.study.model in presets_of(method):
            shipped = load_preset(method, self.study.model)
            finals |= {SHIPPED: shipped} if shipped else {}
        found = self.measure(method, finals | {TUNED: settings}, HELD_OUT, "held out")
        file = self.out / f"{method.lower()}.yaml"
        write_preset(file, method, self.study.model, chosen, self._heading(method), _table(found))

    def measure(
        self, method: str, tried: Mapping[str, Mapping[str, object]], data: str, name: str
    ) -> list[_Candidate]:
        """The rates of settings, in their order."""
        specs = [
            MethodSpec(method, preset=None, settings=dict(settings), label=label)
            for label, settings in tried.items()
        ]
        [facts] = [one for one in self.study.data if one.name == data]
        study = replace(self.study, methods=specs, data=[facts], reference=None)
        file = f"{method.lower()} {name}".replace(" ", "_")
        frame = run_study(study, self.out, file, progress=self.progress).frame
        frame = frame[frame["is_final"] & (frame["kind"] == "") & frame["reading"].isin(READINGS)]
        candidates = []
        for label, settings in tried.items():
            own = frame[frame["method"] == label]
            places = zip(own["metric"], own["reading"], own["value"], strict=True)
            rates = {(str(m), str(r)): float(value) for m, r, value in places}
            candidates.append(_Candidate(label, settings, rates))
            row = {f"{m}/{r}": rates.get((m, r), math.nan) for m in METRICS for r in READINGS}
            told = {"method": method, "data": data, "label": label, "settings": dict(settings)}
            self.rows.append({**told, **row, "score": candidates[-1].score})
        if not any(candidate.rates for candidate in candidates):
            raise EditError(
                f"{method} failed with all settings that were tried of `{name}`; "
                f"`{self.out / 'cells.jsonl'}` says why."
            )
        return candidates

    def _heading(self, method: str) -> list[str]:
        [held_out] = [one for one in self.study.data if one.name == HELD_OUT]
        return [
            f"{method} for {self.study.model}, chosen by `lightning-edit tune`.",
            f"Measured on {held_out.limit} facts at most that it was not chosen by, each alone,",
            "teacher-forced / autoregressive:",
        ]


def _class(name: str) -> type[LocateModule]:
    found = getattr(lightning_edit, name, None) if name in lightning_edit.__all__ else None
    if not (isinstance(found, type) and issubclass(found, LocateModule)):
        known = [
            one
            for one in lightning_edit.__all__
            if isinstance(cls := getattr(lightning_edit, one), type)
            and issubclass(cls, LocateModule)
        ]
        raise EditError(
            f"`methods`: `tune` has rules for {', '.join(known)}, but got {name!r}. Choose one of "
            "these; the settings of others are compared by `lightning-edit compare`."
        )
    return found


def _halves(source: EditDataModule, facts: int) -> tuple[DataSpec, DataSpec]:
    """Every other fact to search by, and the rest to measure by, so that both are of all kinds."""
    requests = source.requests
    if len(requests) < 2:
        raise EditError(
            f"`data` is expected to hold two facts at least, one to search by and one to measure "
            f"by, but it has {len(requests)}."
        )
    parts = [EditDataModule(requests=list(requests[start::2])) for start in (0, 1)]
    return (
        DataSpec(parts[0], known=True, limit=facts, label=SEARCHED),
        DataSpec(parts[1], known=True, limit=facts, label=HELD_OUT),
    )


def _table(found: Sequence[_Candidate]) -> list[list[str]]:
    rows = [["settings", *METRICS]]
    for one in found:
        pairs = ((one.rates.get((metric, reading)) for reading in READINGS) for metric in METRICS)
        rows.append([one.label, *(" / ".join(number(rate, 2) for rate in pair) for pair in pairs)])
    return rows


def _short(value: object) -> str:
    """A value as part of a label."""
    if value is None:
        return "as the class samples them"
    if isinstance(value, list) and value and isinstance(value[0], list):
        return f"{sum(map(len, value))} of them"
    return str(value)
