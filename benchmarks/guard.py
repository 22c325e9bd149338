# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits one after another, with the guard and without it: what it stops, and the damage it spares.

    python benchmarks/guard.py --counterfact counterfact.json --lean --seconds 500
    python benchmarks/guard.py --plot docs/guard.png

Packaged facts that the default model knows are edited in an order drawn by seed 0; the last ten
are canaries, whose answers must stay. Records of CounterFact follow where more edits are asked for
than that. ``--lean`` has ROME and AlphaEdit search by Gauss-Newton, eight passes at most, and ROME
behind MEMIT's five contexts in place of 20. Each run goes on from its checkpoint in ``--folder``
when it is called again, so that it can be cut into pieces of some seconds. Rows go to
``rows.jsonl`` there. FT-M stands for fine-tuning: LocFT has no single edits that a guard could take
back.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

import lightning_edit
from lightning_edit import (
    CounterFact,
    EditCheckpoint,
    EditDataModule,
    EditGuard,
    EditModule,
    Evaluator,
    Facts,
    load_tokenizer,
)
from lightning_edit.callbacks.edit_guard import Breach
from lightning_edit.core.edit import Edit
from lightning_edit.core.request import EditRequest
from lightning_edit.evaluation.prose import perplexity, read_prose
from lightning_edit.functional.matching import autoregressive_hit
from lightning_edit.presets import load_preset

#: Each method with its class and its preset.
METHODS = {
    "ROME": ("ROME", "smollm2"),
    "AlphaEdit": ("AlphaEdit", "smollm2"),
    "FT-M": ("FineTune", "ft_m"),
}
CANARIES = 10
PERPLEXITY = 1.1
TEXT = 1000  # characters of prose, which a pass reads in one window


class Watch(Callback):
    """Measures what stands after every few edits, and ends a piece when its time is over."""

    def __init__(
        self, file: Path, about: dict[str, object], asked: Sequence[EditRequest], every: int
    ) -> None:
        self.file, self.about, self.every = file, about, every
        self.asked = {request.id: request for request in asked}
        self.until = float("inf")
        self.canaries: dict[str, str] = {}
        self.text = ""
        self.reference = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the unedited model."""
        editor = cast("EditModule[Edit]", pl_module)
        with editor.base_weights():
            self.reference = perplexity(editor.model, editor.evaluator.tokens, self.text)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object, **kwargs: object
    ) -> None:
        """Measures the edited one after every few edits."""
        step = trainer.global_step
        if step % self.every == 0 or step == len(self.asked):
            editor = cast("EditModule[Edit]", pl_module)
            row = {**self.about, "step": step, **self.measure(editor)}
            row["stopped"] = [breach.why for breach in stopped(trainer)]
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
        trainer.should_stop |= time.monotonic() > self.until

    def measure(self, editor: EditModule[Edit]) -> dict[str, float]:
        """Shares of canaries and edits that hold, and perplexity over that of before."""
        tokens = editor.evaluator.tokens
        evaluator = Evaluator(editor.model, tokens, readings=["teacher_forced"], max_new_tokens=6)
        texts = evaluator.continuations(list(self.canaries))
        kept = [
            autoregressive_hit(False, text, [answer])
            for text, answer in zip(texts, self.canaries.values(), strict=True)
        ]
        made = [self.asked[name].fact() for name in editor.target.request_ids]
        probes = evaluator.evaluate(made).probes if made else []
        held = sum(bool(one.exact) for one in probes if one.metric == "reliability")
        ratio = perplexity(editor.model, tokens, self.text) / self.reference
        return {
            "canaries": sum(kept) / len(kept),
            "perplexity_ratio": ratio,
            "kept": len(made),
            "held": held,
        }


def stopped(trainer: Trainer) -> list[Breach]:
    """What the guard of a run took back, where there is one."""
    guards = [one for one in trainer.callbacks if isinstance(one, EditGuard)]  # type: ignore[attr-defined]
    return [breach for guard in guards for breach in guard.breaches]


def draw(count: int, counterfact: Path | None) -> tuple[list[EditRequest], list[EditRequest]]:
    """What is asked for, at most ``count``, and whose answers must stay."""
    data = Facts()
    data.setup("fit")
    drawn = random.Random(0).sample(data.requests, len(data.requests))  # noqa: S311 - no secret
    asked, canaries = drawn[:-CANARIES], drawn[-CANARIES:]
    if counterfact is not None:
        asked += CounterFact(path=str(counterfact)).requests
    return asked[:count], canaries


def run(
    method: str,
    guarded: bool,
    asked: Sequence[EditRequest],
    canaries: Sequence[EditRequest],
    every: int,
    until: float,
    lean: bool,
    folder: Path,
) -> None:
    """A run, or what is left of it, until its time is over."""
    own = folder / f"{method}-{'guarded' if guarded else 'alone'}"
    last = own / "last.ckpt"
    text = folder / "prose.txt"
    text.write_text(read_prose()[:TEXT])
    about: dict[str, object] = {"method": method, "guarded": guarded}
    watch = Watch(folder / "rows.jsonl", about, asked, every)
    watch.until, watch.text = until, text.read_text()
    watch.canaries = {one.prompt: str(one.target_old) for one in canaries}
    guard = EditGuard(
        watch.canaries,
        perplexity_ratio=PERPLEXITY,
        on_breach="continue",
        text=str(text),
        max_new_tokens=6,
    )
    name, preset = METHODS[method]
    settings = load_preset(name, preset)
    if lean and method != "FT-M":
        model, tokenizer = lightning_edit.load_model("smollm2"), load_tokenizer("smollm2")
        memit = lightning_edit.MEMIT.from_model(model, tokenizer, preset="smollm2")
        contexts = memit.template_groups
        settings |= {"search": "gauss_newton", "steps": 8, "context_templates": contexts}
    editor = getattr(lightning_edit, name)("smollm2", **settings)
    trainer = Trainer(
        max_epochs=1,
        callbacks=[*([guard] if guarded else []), watch, EditCheckpoint(str(own))],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(
        editor,
        EditDataModule(requests=list(asked)),
        ckpt_path=last if last.exists() else None,
        weights_only=True,
    )


def plot(rows: Sequence[dict[str, object]], picture: Path) -> None:
    """Draws what was measured: a column for each method, damage with the guard and without."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    figures = ("canaries", "perplexity_ratio", "held")
    figure, axes = pyplot.subplots(
        len(figures), len(methods), figsize=(3.4 * len(methods), 7), sharex=True, squeeze=False
    )
    for column, method in enumerate(methods):
        for guarded, color, style in ((False, "#d55e00", "--"), (True, "#0072b2", "-")):
            line = {
                int(str(row["step"])): row
                for row in rows
                if (row["method"], row["guarded"]) == (method, guarded)
            }
            steps = sorted(line)
            label = "with the guard" if guarded else "without"
            for axis, name in zip(axes[:, column], figures, strict=True):
                values = [float(str(line[step][name])) for step in steps]
                axis.plot(steps, values, style, color=color, label=label)
        axes[0, column].set(title=method, ylim=(-0.03, 1.03))
        axes[2, column].set(xlabel="edits asked for")
        axes[1, column].axhline(PERPLEXITY, color="gray", linewidth=0.8)
    axes[0, 0].set_ylabel("share of canaries kept")
    axes[1, 0].set_ylabel("perplexity ratio")
    axes[2, 0].set_ylabel("edits that hold")
    axes[0, 0].legend(loc="lower left", frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder
    if arguments.plot is not None:
        lines = (folder / "rows.jsonl").read_text().splitlines()
        plot([json.loads(line) for line in lines], arguments.plot)
        return
    folder.mkdir(parents=True, exist_ok=True)
    asked, canaries = draw(arguments.count, arguments.counterfact)
    until = time.monotonic() + arguments.seconds
    warnings.filterwarnings("ignore", message=r"EditGuard|.*edits did not take")
    for method in arguments.methods:
        for guarded in (False, True):
            if time.monotonic() < until:
                run(
                    method, guarded, asked, canaries, arguments.every, until, arguments.lean, folder
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--counterfact", type=Path, help="a file of CounterFact")
    parser.add_argument("--lean", action="store_true")
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--folder", type=Path, default=Path("runs/guard"))
    parser.add_argument("--plot", type=Path)
    main(parser.parse_args())
