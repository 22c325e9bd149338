# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Does forgetting first help to learn? The study of F-Learning (arXiv 2311.08011).

    python benchmarks/f_learning.py choose --data zsre --path pairs.json --out runs/f_learning/zsre
    python benchmarks/f_learning.py run --data zsre --path pairs.json --out ... --seeds 0 1 2 3 4
    python benchmarks/f_learning.py show --out runs/f_learning/zsre --plot curves.png

As in the paper: θ is the base model tuned on the old answers; task vectors come from tuning θ on
them once more; every method then learns the new answers of all pairs at once, from θ or from what
forgetting left of it; locality compares with θ.

``choose`` tunes learning rate, epochs and rank of plain tuning on pairs of their own, until it
learns the new answers, for a comparison with badly tuned baselines says nothing. ``run`` makes a
seed's rows: the pairs and their order, LoRA's A. Rows that are done are kept in ``--out``, each as
soon as it is there; an interrupted seed makes θ and its vectors again and goes on. Several
processes may run seeds of their own. ``show`` makes the tables, with intervals over pairs.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from operator import eq
from pathlib import Path
from typing import TypedDict

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.optim import Adam
from typing_extensions import override

from lightning_edit import (
    CounterFact,
    EditDataModule,
    EditRequest,
    Evaluator,
    Facts,
    FullTuning,
    LoRATuning,
    OldNewPairs,
    Probe,
    PromptTokenizer,
    WeightDelta,
    load_model,
    load_tokenizer,
)
from lightning_edit.evaluation.evaluator import Baseline
from lightning_edit.evaluation.scoring import Score, score_targets
from lightning_edit.forgetting.importance import fisher_diagonals, weighted
from lightning_edit.forgetting.subtract import forget_
from lightning_edit.functional.bootstrap import (
    cluster_means,
    cluster_weights,
    percentile_interval,
    sign_flip_p,
)
from lightning_edit.metrics.reading import Reading

RATES = (0.05, 0.1, 0.3, 0.7, 1.5, 3.0)
SPARED = ((0.7, "FT"), (3.0, "FT"), (3.0, "LoRA-FT"))
ENOUGH = 0.9  # reliability that plain tuning must reach to be a baseline
WEIGHED = 64  # answers by which the importance of parameters is found
CURVE = 5  # first epochs of which each is measured

Row = dict[str, float | str]
Scores = dict[str, dict[str, float]]  # figure to request id to value


class Choice(TypedDict):
    """What `choose` found."""

    chosen: dict[str, Row]
    rows: list[Row]


class Done(TypedDict, total=False):
    """A row of a seed that is done."""

    scores: Scores
    curve: list[dict[str, float]]
    forgotten: dict[str, float]


Seed = dict[str, Done]


@dataclass(frozen=True)
class Tuning:
    """How a model is tuned.

    Args:
        kind: ``FT`` or ``LoRA``.
        lr: Learning rate of Adam.
        epochs: Of all pairs.
        rank: Of LoRA, whose alpha is twice the rank.
    """

    kind: str
    lr: float
    epochs: int
    rank: int = 8

    @classmethod
    def of(cls, row: Mapping[str, float | str]) -> Tuning:
        """What a row of `choose` was made by."""
        return cls(str(row["kind"]), float(row["lr"]), int(row["epochs"]), int(row["rank"]))


class Study:
    """A model, its states, and what is measured on them.

    Args:
        options: Of the command line.
        requests: Pairs of an old and a new answer.
        seed: Of whatever is drawn.
    """

    def __init__(self, options: argparse.Namespace, requests: list[EditRequest], seed: int) -> None:
        self.options = options
        self.seed = seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model("smollm2").to(self.device)
        self.tokenizer = load_tokenizer("smollm2")
        self.tokens = PromptTokenizer(self.tokenizer)
        self.new = requests
        self.old = [request.reversed() for request in requests]
        self.baseline = Baseline({})
        self.p_theta: list[float] = []

    def tune(
        self, tuning: Tuning, requests: Sequence[EditRequest], *callbacks: Callback
    ) -> WeightDelta:
        """Trains the model as it stands by Lightning's own loop; returns the change."""
        kind: type[FullTuning | LoRATuning] = FullTuning
        settings: dict[str, float] = {}
        if tuning.kind == "LoRA":
            kind = LoRATuning
            settings = {"rank": tuning.rank, "alpha": 2.0 * tuning.rank, "seed": self.seed}
        editor = kind.from_model(
            self.model,
            self.tokenizer,
            preset="smollm2",
            end_token=True,  # only a model that has learned to stop can be read by what it writes
            optimizer=lambda parameters: Adam(parameters, lr=tuning.lr, fused=True),
            **settings,
        )
        trainer = Trainer(
            max_epochs=tuning.epochs,
            callbacks=list(callbacks),
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        data = EditDataModule(list(requests), batch_size=self.options.batch_size, seed=self.seed)
        trainer.fit(editor, datamodule=data)
        self.model.to(self.device)
        return WeightDelta(editor.delta.changes)  # without the originals, half of its memory

    def state(self) -> dict[str, Tensor]:
        """Copies of all weights."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts copies of all weights back."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[name])

    def make_theta(self) -> dict[str, Tensor]:
        """Tunes the model on the old answers: θ, with which locality and residual compare."""
        options = self.options
        self.tune(Tuning("FT", options.theta_lr, options.theta_epochs), self.old)
        self.baseline = self._evaluator().baseline(self.new)
        self.p_theta, known = self.old_answers()
        _note(f"seed {self.seed}: θ knows {sum(known)} of {len(known)} old answers")
        return self.state()

    def measure(self, readings: Sequence[Reading] | None = None) -> Scores:
        """Scores of the model as it stands: figure to request id to value."""
        found: dict[str, dict[str, list[float]]] = {}
        for probe in self._evaluator(readings).evaluate(self.new, self.baseline).probes:
            for reading in ("teacher_forced", "exact", "autoregressive"):
                value = getattr(probe, reading)
                if value is not None:
                    key = f"{probe.metric}/{reading}"
                    found.setdefault(key, {}).setdefault(probe.request_id, []).append(float(value))
        scores = {k: {i: sum(v) / len(v) for i, v in by.items()} for k, by in found.items()}
        now, known = self.old_answers()
        ids = [request.id for request in self.new]
        scores["old_known"] = dict(zip(ids, map(float, known), strict=True))
        ratios = [p / q if q > 0.01 else math.nan for p, q in zip(now, self.p_theta, strict=True)]
        scores["residual"] = {i: r for i, r in zip(ids, ratios, strict=True) if not math.isnan(r)}
        return scores

    def means(self) -> dict[str, float]:
        """Means of the teacher-forced scores."""
        return {key: _mean(by.values()) for key, by in self.measure(["teacher_forced"]).items()}

    def reliability(self) -> dict[str, float]:
        """The share of the new answers' tokens that come first, alone of all figures."""
        shares = [
            _mean(map(float, map(eq, score.argmax, score.target)))
            for score in self._scores(self.new)
        ]
        return {"reliability/teacher_forced": _mean(shares)}

    def old_answers(self) -> tuple[list[float], list[bool]]:
        """P(old answer | prompt) of each pair, and whether all its tokens come first."""
        scores = self._scores(self.old)
        values = [math.exp(math.fsum(s.log_probs)) for s in scores]
        return values, [s.argmax == s.target for s in scores]

    def _scores(self, requests: Sequence[EditRequest]) -> list[Score]:
        pairs = [
            (self.tokens.prompt(r.prompt), self.tokens.target(r.prompt, r.target_new))
            for r in requests
        ]
        return score_targets(self.model, self.tokens, pairs, max_tokens=8192)

    def spared(self, vector: WeightDelta, retain: Sequence[EditRequest]) -> WeightDelta:
        """A task vector that spares what other answers need."""
        names = list(vector.changes)
        old, kept = (
            fisher_diagonals(self.model, self.tokens, requests[:WEIGHED], names)
            for requests in (self.old, retain)
        )
        return weighted(vector, old, kept)

    def _evaluator(self, readings: Sequence[Reading] | None = None) -> Evaluator:
        return Evaluator(
            self.model, self.tokens, readings=readings, max_new_tokens=12, max_tokens=8192
        )


class Curve(Callback):
    """Measures after each of the first epochs, under teacher forcing.

    Args:
        epochs: How many of them.
        measure: What is measured.
    """

    def __init__(self, epochs: int, measure: Callable[[], dict[str, float]]) -> None:
        self.epochs = epochs
        self.measure = measure
        self.points: list[dict[str, float]] = []

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch < self.epochs:
            self.points.append(self.measure())


def requests_of(options: argparse.Namespace) -> tuple[list[EditRequest], list[EditRequest]]:
    """Pairs to choose by, and all others, in an order that is always the same."""
    kinds = {"zsre": OldNewPairs, "counterfact": CounterFact}
    if options.data == "facts":
        data: EditDataModule = Facts(known_to=None, seed=0)
    else:
        data = kinds[options.data](path=options.path, seed=0, skip_invalid=True)
    requests = [_trimmed(request) for request in data.requests if request.target_old]
    return requests[: options.validation], requests[options.validation :]


def _trimmed(request: EditRequest) -> EditRequest:
    """As the paper measures: one rephrasing, one locality probe."""
    return replace(
        request, rephrases=request.rephrases[:1], locality=request.locality[:1], portability=()
    )


def _asked(probe: Probe) -> EditRequest:
    """A locality probe's own answer as a request."""
    return EditRequest(probe.prompt, "", probe.answer, glued=probe.glued)


def choose(options: argparse.Namespace) -> None:
    """Finds settings by which plain tuning learns the new answers, on pairs of their own."""
    torch.manual_seed(0)
    study = Study(options, requests_of(options)[0], 0)
    theta = study.make_theta()
    rows: list[Row] = []
    wanted = [Tuning("FT", lr, options.epochs) for lr in options.lr]
    wanted += [
        Tuning("LoRA", lr, options.lora_epochs, rank)
        for lr in options.lora_lr
        for rank in options.rank
    ]
    for tuning in wanted:
        study.restore(theta)
        curve = Curve(tuning.epochs, study.means)
        study.tune(tuning, study.new, curve)
        for epoch, point in enumerate(curve.points, start=1):
            rows.append({**asdict(replace(tuning, epochs=epoch)), **point})
        _note(f"{tuning}: reliability {curve.points[-1]['reliability/teacher_forced']:.3f}")
    chosen = {kind: best([row for row in rows if row["kind"] == kind]) for kind in ("FT", "LoRA")}
    _write(Path(options.out) / "choice.json", {"chosen": chosen, "rows": rows})


def best(rows: Sequence[Row]) -> Row:
    """Of settings that learn enough the one that generalizes and spares most; else the most."""

    def figure(row: Row, name: str) -> float:
        return float(row[f"{name}/teacher_forced"])

    enough = [row for row in rows if figure(row, "reliability") >= ENOUGH]
    if not enough:
        return max(rows, key=lambda row: figure(row, "reliability"))
    return max(enough, key=lambda row: figure(row, "generality") + figure(row, "locality"))


def plans() -> Iterator[tuple[str, str, str, float]]:
    """Rows in the order in which they are made: name, vector, what learns, λ."""
    yield "FT", "", "FT", 0.0
    yield "LoRA", "", "LoRA", 0.0
    # From the middle of the grid on, so that what is interrupted shows most.
    for rate in sorted(RATES, key=lambda r: abs(math.log(r / 0.5))):
        yield f"F-Learning FT, λ = {rate:g}", "FT", "FT", rate
        yield f"F-Learning LoRA, λ = {rate:g}", "LoRA", "LoRA", rate
        yield f"F-Learning LoRA-FT, λ = {rate:g}", "LoRA", "FT", rate
    for rate, kind in SPARED:
        vector = "FT, spared" if kind == "FT" else "LoRA, spared"
        yield f"F-Learning {kind}, spared, λ = {rate:g}", vector, "FT", rate


def run(options: argparse.Namespace) -> None:
    """Makes the rows of some seeds."""
    out = Path(options.out)
    chosen = json.loads((out / "choice.json").read_text("utf-8"))["chosen"]
    fields = Tuning.__dataclass_fields__
    tunings = {
        k: Tuning(**{f: v for f, v in row.items() if f in fields}) for k, row in chosen.items()
    }
    validation, pool = requests_of(options)
    kept = [probe for request in validation for probe in request.locality if probe.answer]
    retain = [_asked(probe) for probe in kept]
    for seed in options.seeds:
        file = out / f"seed-{seed}.json"
        done: Seed = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        wanted = list(islice(plans(), options.rows))
        if all(name in done for name, *_ in wanted):
            continue
        seed_everything(seed, verbose=False)
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
        study = Study(options, [pool[i] for i in order[: options.pairs]], seed)
        theta = study.make_theta()
        vectors: dict[str, WeightDelta] = {}
        for kind in ("FT", "LoRA"):
            vectors[kind] = study.tune(tunings[kind], study.old)
            study.restore(theta)
        if "θ" not in done:
            done["θ"] = {"scores": study.measure()}
        for name, vector, learns, rate in wanted:
            if name in done:
                continue
            began = time.perf_counter()
            study.restore(theta)
            left: dict[str, float] = {}
            if vector:
                if vector not in vectors:
                    vectors[vector] = study.spared(vectors[vector.partition(",")[0]], retain)
                forget_(study.model, vectors[vector], rate)
                left = study.means()
            curve = Curve(CURVE, study.reliability)
            study.tune(tunings[learns], study.new, curve)
            done[name] = {"scores": study.measure(), "curve": curve.points, "forgotten": left}
            _write(file, done)
            _note(f"seed {seed}: {name} in {time.perf_counter() - began:.1f} s")


METRICS = ("reliability", "generality", "locality")


@dataclass(frozen=True)
class Sample:
    """A figure of each pair, the mean over seeds where a pair is in several.

    Args:
        values: Request id to value.
    """

    values: Mapping[str, float]

    @classmethod
    def of(
        cls,
        seeds: Iterable[Mapping[str, dict[str, dict[str, dict[str, float]]]]],
        name: str,
        key: str,
    ) -> Sample:
        """Gathers a figure of a row over all seeds."""
        found: dict[str, list[float]] = {}
        for seed in seeds:
            for id_, value in seed[name]["scores"].get(key, {}).items():
                found.setdefault(id_, []).append(value)
        return cls({id_: _mean(values) for id_, values in found.items()})

    def mean(self) -> str:
        """Mean and its interval of 95 %, by a bootstrap over pairs."""
        if not self.values:
            return "–"
        values = torch.tensor(list(self.values.values()), dtype=torch.float64)[:, None]
        draws = cluster_means(values, torch.ones_like(values), cluster_weights(len(values)))
        low, high = percentile_interval(draws)
        return f"{float(values.mean()):.3f} ({float(low):.3f} – {float(high):.3f})"

    def against(self, other: Sample) -> str:
        """Difference from another row on the same pairs, and its p."""
        ids = [id_ for id_ in self.values if id_ in other.values]
        if not ids:
            return "–"
        difference = torch.tensor([self.values[i] - other.values[i] for i in ids]).double()
        p = float(sign_flip_p(difference[:, None])[0])
        return f"{float(difference.mean()):+.3f} (p {p:.3f})"


def show(options: argparse.Namespace) -> None:
    """Prints the tables of all seeds."""
    out = Path(options.out)
    choice = json.loads((out / "choice.json").read_text("utf-8"))
    seeds = [json.loads(file.read_text("utf-8")) for file in sorted(out.glob("seed-*.json"))]
    print("\n".join(_choice_table(choice)))
    if not seeds:
        raise SystemExit(f"{out} has no seed yet: make one with `run`.")
    names = ["θ", *(name for name, *_ in plans())]
    names = [name for name in names if all(name in seed for seed in seeds)]
    for reading in ("teacher_forced", "autoregressive"):
        print(f"\n{reading}, {len(seeds)} seeds; in brackets 95 % over pairs\n")
        print("| row | reliability | generality | locality | residual |\n|---|---|---|---|---|")
        for name in names:
            keys = [f"{metric}/{reading}" for metric in METRICS]
            cells = [Sample.of(seeds, name, key).mean() for key in [*keys, "residual"]]
            print(f"| {name} | {' | '.join(cells)} |")
        print("\nDifference from FT, of F-Learning LoRA from LoRA, on the same pairs\n")
        print("| row | reliability | generality | locality |\n|---|---|---|---|")
        for name, _, learns, rate in plans():
            if name not in names or not rate:
                continue
            pairs = [(Sample.of(seeds, name, k), Sample.of(seeds, learns, k)) for k in keys]
            print(f"| {name} | {' | '.join(a.against(b) for a, b in pairs)} |")
    print("\n".join(_curve_table(seeds, names)))
    print("\n".join(_forgotten_table(seeds, names)))
    if options.plot:
        _plot(seeds, names, options.plot)


def _choice_table(choice: Mapping[str, object]) -> list[str]:
    lines = [
        "| tuning | lr | rank | epochs | reliability | generality | locality |",
        "|---" * 7 + "|",
    ]
    chosen: Mapping[str, Row] = choice["chosen"]  # type: ignore[assignment]
    for row in choice["rows"]:  # type: ignore[attr-defined]
        mark = " (chosen)" if row in chosen.values() else ""
        figures = [row[f"{m}/teacher_forced"] for m in ("reliability", "generality", "locality")]
        rank = row["rank"] if row["kind"] == "LoRA" else "–"
        told = " | ".join(f"{figure:.3f}" for figure in figures)
        lines.append(f"| {row['kind']}{mark} | {row['lr']:g} | {rank} | {row['epochs']} | {told} |")
    return lines


def _curve_table(seeds: Sequence[Seed], names: Sequence[str]) -> list[str]:
    lines = ["", "Reliability, teacher-forced, after each of the first epochs (mean of seeds)", ""]
    lines += [
        "| row | " + " | ".join(str(i + 1) for i in range(CURVE)) + " |",
        "|---" * (CURVE + 1) + "|",
    ]
    for name in names[1:]:
        curves = [seed[name]["curve"] for seed in seeds]
        points = [
            _mean(curve[i]["reliability/teacher_forced"] for curve in curves)
            for i in range(min(map(len, curves)))
        ]
        lines.append(f"| {name} | " + " | ".join(f"{p:.3f}" for p in points) + " |")
    return lines


def _forgotten_table(seeds: Sequence[Seed], names: Sequence[str]) -> list[str]:
    lines = ["", "What forgetting alone leaves of θ, before the new is learned (mean of seeds)", ""]
    lines += ["| row | old answers known | residual | locality |", "|---|---|---|---|"]
    for name in names[1:]:
        found = [seed[name]["forgotten"] for seed in seeds]
        if all(found):
            keys = ("old_known", "residual", "locality/teacher_forced")
            means = [_mean(f[key] for f in found) for key in keys]
            lines.append(f"| {name} | " + " | ".join(f"{m:.3f}" for m in means) + " |")
    return lines


def _plot(seeds: Sequence[Seed], names: Sequence[str], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axis, base in zip(axes, ("FT", "LoRA"), strict=True):
        rows = [name for name, _, learns, _ in plans() if learns == base and name in names]
        rows = [name for name in rows if name == base or f"Learning {base}," in name]
        for i, name in enumerate(row for row in rows if "spared" not in row):
            curves = [seed[name]["curve"] for seed in seeds]
            values = [
                _mean(c[e]["reliability/teacher_forced"] for c in curves)
                for e in range(min(map(len, curves)))
            ]
            color = "black" if name == base else plt.colormaps["viridis"](i / len(rows))
            label = "plain" if name == base else name.rpartition(", ")[2]
            axis.plot(range(1, len(values) + 1), values, color=color, label=label, marker=".")
        axis.set_title(f"{base}: learning after forgetting")
        axis.set_xlabel("epoch")
        axis.legend(fontsize="small", frameon=False)
    axes[0].set_ylabel("reliability, teacher-forced")
    figure.savefig(path, dpi=130)


def _mean(values: Iterable[float]) -> float:
    found = [value for value in values if not math.isnan(value)]
    return sum(found) / len(found) if found else math.nan


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value) + "\n", encoding="utf-8")
    part.replace(path)


_BEGAN = time.perf_counter()


def _note(what: str) -> None:
    print(f"{time.perf_counter() - _BEGAN:.0f} s: {what}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=["choose", "run", "show"])
    parser.add_argument("--out", default="runs/f_learning")
    parser.add_argument("--data", choices=["zsre", "counterfact", "facts"], default="facts")
    parser.add_argument("--path", help="file of the data; none for the packaged facts")
    parser.add_argument("--pairs", type=int, default=300, help="pairs of a seed")
    parser.add_argument(
        "--validation", type=int, default=300, help="pairs that settings are chosen by"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", type=int, help="rows of a seed, from the first on; all if none")
    parser.add_argument("--theta_epochs", type=int, default=3, help="of θ, as in the paper")
    parser.add_argument("--theta_lr", type=float, default=1e-4)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-5, 1e-4, 2e-4])
    parser.add_argument("--epochs", type=int, default=8, help="most of full tuning")
    parser.add_argument("--lora_lr", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--lora_epochs", type=int, default=16, help="most of LoRA")
    parser.add_argument("--plot", help="picture of the curves, for show")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    {"choose": choose, "run": run, "show": show}[options.stage](options)


if __name__ == "__main__":
    main()
