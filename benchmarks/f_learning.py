# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Does forgetting first help to learn? The study of F-Learning (arXiv 2311.08011), made small.

    python benchmarks/f_learning.py --out runs/f_learning.json
    python benchmarks/f_learning.py --data old_new_pairs.json --pairs 200 --out runs/pairs.json

As in the paper: θ is the base model tuned on the old answers; task vectors come from tuning θ on
them once more; every method then learns the new answers of all pairs at once, from θ or from what
forgetting left of it. Locality compares with θ. Finished rows are kept in ``--out``: an
interrupted study makes θ and the task vectors of its seed again, bit for bit, and goes on with the
rows that are missing.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_edit import (
    EditDataModule,
    EditRequest,
    Evaluator,
    Facts,
    FullTuning,
    LoRATuning,
    OldNewPairs,
    PromptTokenizer,
    WeightDelta,
    load_model,
    load_tokenizer,
)
from lightning_edit.evaluation.evaluator import Baseline
from lightning_edit.forgetting.subtract import forget_, sweep_forgetting
from lightning_edit.functional.task_vector import old_answer_residual
from lightning_edit.metrics import edit_metrics
from lightning_edit.metrics.reading import Reading

COLUMNS = (
    "reliability/teacher_forced",
    "reliability/teacher_forced_strict",
    "reliability/autoregressive",
    "generality/teacher_forced",
    "generality/autoregressive",
    "locality/teacher_forced",
    "residual",
)


class Study:
    """One seed: a model, its states, and what is measured on them."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options = options
        self.seed = seed
        self.model: Any = load_model("smollm2")
        self.tokenizer = load_tokenizer("smollm2")
        data: EditDataModule = Facts(known_to=None, seed=seed)
        if options.data:
            data = OldNewPairs(path=options.data, limit=options.pairs, seed=seed, skip_invalid=True)
        elif options.pairs:
            data = Facts(known_to=None, seed=seed, limit=options.pairs)
        self.new = [_trimmed(request) for request in data.requests]
        self.old = [_trimmed(request) for request in data.old_requests]
        self.tokens = PromptTokenizer(self.tokenizer)
        self.baseline = Baseline({})
        self.known: list[int] = []
        self.p_theta = torch.empty(0)

    def tune(
        self,
        kind: type[FullTuning] | type[LoRATuning],
        requests: list[EditRequest],
        epochs: int | None = None,
    ) -> WeightDelta:
        """Trains the model as it stands by Lightning's own loop; returns the change."""
        rate = self.options.lr if kind is FullTuning else self.options.lora_lr
        # Only a model that has learned to stop can be read by what it writes.
        end = self.options.autoregressive
        editor = kind.from_model(
            self.model, self.tokenizer, preset="smollm2", lr=rate, end_token=end
        )
        trainer = Trainer(
            max_epochs=epochs or self.options.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        data = EditDataModule(requests, batch_size=self.options.batch_size, seed=self.seed)
        trainer.fit(editor, datamodule=data)
        return WeightDelta(editor.delta.changes)  # without the originals, half of its memory

    def state(self) -> dict[str, Tensor]:
        """Copies of all weights."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts copies of all weights back."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[name])

    def freeze_theta(self) -> None:
        """Takes the model as θ: locality and residual will compare with it."""
        evaluator = self._evaluator()
        self.baseline = evaluator.baseline(self.new)
        probabilities, known = self._old_probabilities()
        self.known = [i for i, hit in enumerate(known) if hit]
        self.p_theta = probabilities[self.known]

    def measure(self) -> dict[str, float]:
        """All figures of the model as it stands."""
        evaluation = self._evaluator().evaluate(self.new, self.baseline)
        metrics = edit_metrics(kinds=(), likelihoods=True)
        evaluation.update(metrics)
        row = {key: float(value) for key, value in metrics.compute().items()}
        return {**{k: v for k, v in row.items() if not math.isnan(v)}, **self.residual()}

    def residual(self) -> dict[str, float]:
        """What is left of the old answers that θ knew."""
        probabilities, known = self._old_probabilities()
        value = math.nan
        if self.known:
            value = float(old_answer_residual(probabilities[self.known], self.p_theta))
        return {"residual": value, "old_known": sum(known) / len(known)}

    def sweep(self, vector: WeightDelta, rates: Iterable[float]) -> list[dict[str, float]]:
        """What forgetting alone does, at each rate of one vector."""
        # Only what the table shows: the new answers are not learned yet.
        asked = [replace(request, rephrases=(), target_old=None) for request in self.new]

        def evaluate() -> dict[str, float]:
            quick = Evaluator(self.model, self.tokens, readings=["teacher_forced"])
            locality, _ = quick.evaluate(asked, self.baseline).mean("locality/teacher_forced")
            return {**self.residual(), "locality/teacher_forced": locality}

        return sweep_forgetting(self.model, vector, rates, evaluate)

    def _evaluator(self) -> Evaluator:
        readings: list[Reading] = ["teacher_forced"]
        if self.options.autoregressive:
            readings.append("autoregressive")
        return Evaluator(
            self.model,
            self.tokens,
            readings=readings,
            max_new_tokens=self.options.max_new_tokens,
        )

    def _old_probabilities(self) -> tuple[Tensor, list[bool]]:
        """P(old answer | prompt) of each pair, and whether all its tokens come first."""
        from lightning_edit.evaluation.scoring import score_targets

        pairs = [
            (self.tokens.prompt(r.prompt), self.tokens.target(r.prompt, r.target_new))
            for r in self.old
        ]
        scores = score_targets(self.model, self.tokens, pairs)
        values = torch.tensor([math.exp(math.fsum(s.log_probs)) for s in scores])
        return values, [s.argmax == s.target for s in scores]


def _trimmed(request: EditRequest) -> EditRequest:
    """As the paper measures: one rephrasing, one locality probe."""
    return replace(
        request, rephrases=request.rephrases[:1], locality=request.locality[:1], portability=()
    )


def run_seed(options: argparse.Namespace, seed: int, done: dict[str, Any], save: Any) -> None:
    """The missing rows of one seed, each saved as soon as it is there."""
    study = Study(options, seed)
    note = _Note(f"seed {seed}", time.perf_counter())
    study.tune(FullTuning, study.old, options.theta_epochs)
    theta = study.state()
    study.freeze_theta()
    note(f"theta knows {len(study.known)} of {len(study.old)} old answers")

    def add(name: str) -> None:
        done[name] = study.measure()
        save()
        note(name)

    if "base (theta)" not in done:
        add("base (theta)")
    vector = study.tune(FullTuning, study.old)
    study.restore(theta)
    adapter = study.tune(LoRATuning, study.old)
    study.restore(theta)
    if "sweep" not in done:
        done["sweep"] = {
            "FT": study.sweep(vector, options.sweep),
            "LoRA": study.sweep(adapter, [*options.sweep, *options.lora_ft_rates]),
        }
        save()
        note("sweep")
    plans: list[tuple[str, Any, WeightDelta | None, float]] = [
        ("FT", FullTuning, None, 0.0),
        ("LoRA", LoRATuning, None, 0.0),
    ]
    plans += [(f"F-Learning FT λ={r:g}", FullTuning, vector, r) for r in options.ft_rates]
    plans += [(f"F-Learning LoRA λ={r:g}", LoRATuning, adapter, r) for r in options.lora_rates]
    plans += [
        (f"F-Learning LoRA-FT λ={r:g}", FullTuning, adapter, r) for r in options.lora_ft_rates
    ]
    for name, kind, tau, rate in plans:
        if name in done:
            continue
        study.restore(theta)
        if tau is not None:
            forget_(study.model, tau, rate)
        study.tune(kind, study.new)
        add(name)


class _Note:
    def __init__(self, where: str, began: float) -> None:
        self.where, self.began = where, began

    def __call__(self, what: str) -> None:
        sys.stderr.write(f"{self.where}, {time.perf_counter() - self.began:.0f} s: {what}\n")


def table(seeds: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Mean and standard deviation over seeds, as Markdown."""
    names = [n for n in next(iter(seeds.values())) if n != "sweep"]
    lines = ["| method | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in names:
        cells = []
        for column in COLUMNS:
            values = [s[name][column] for s in seeds.values() if column in s.get(name, {})]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}" if values else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def sweep_table(seeds: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Forgetting alone at several rates, mean over seeds, as Markdown."""
    lines = [
        "| task vector | λ | old answers known | residual | locality |",
        "|---|---|---|---|---|",
    ]
    first = next(iter(seeds.values())).get("sweep", {})
    for kind, rows in first.items():
        for i, row in enumerate(rows):
            found = [s["sweep"][kind][i] for s in seeds.values() if "sweep" in s]
            keys = ("old_known", "residual", "locality/teacher_forced")
            means = [statistics.fmean(f[key] for f in found) for key in keys]
            lines.append(
                f"| {kind} | {row['rate']:g} | " + " | ".join(f"{m:.3f}" for m in means) + " |"
            )
    return lines


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="a file of old/new pairs; the packaged facts without it")
    parser.add_argument("--pairs", type=int, help="number of pairs; all of them without it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--theta_epochs", type=int, default=3, help="of θ, as in the paper")
    parser.add_argument("--epochs", type=int, default=3, help="of every later stage")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-5, help="of full tuning, as in the paper")
    parser.add_argument("--lora_lr", type=float, default=1e-3)
    parser.add_argument("--ft_rates", type=float, nargs="*", default=[0.1, 0.3])
    parser.add_argument("--lora_rates", type=float, nargs="*", default=[0.7])
    parser.add_argument("--lora_ft_rates", type=float, nargs="*", default=[3.0])
    parser.add_argument("--sweep", type=float, nargs="*", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument(
        "--autoregressive",
        action="store_true",
        help="also read what the models write, which takes most of the time",
    )
    parser.add_argument("--max_new_tokens", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="runs/f_learning.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "seeds", "threads")}
    results: dict[str, Any] = {"settings": settings, "seeds": {}}
    if out.is_file():
        earlier = json.loads(out.read_text("utf-8"))
        if earlier["settings"] != settings:
            raise SystemExit(f"{out} was made with other settings; name another file with --out.")
        results = earlier

    def save() -> None:
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for seed in options.seeds:
        if results["seeds"].get(str(seed), {}).get("complete"):
            continue
        done: dict[str, Any] = results["seeds"].setdefault(str(seed), {})
        torch.manual_seed(seed)
        run_seed(options, seed, done, save)
        done["complete"] = {}
        save()
    seeds = {
        s: {k: v for k, v in d.items() if k != "complete"} for s, d in results["seeds"].items()
    }
    sys.stdout.write("\n".join([*table(seeds), "", *sweep_table(seeds), ""]))
    sys.stdout.write(json.dumps({"rows": seeds}) + "\n")


if __name__ == "__main__":
    main()
