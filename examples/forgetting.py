# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Forgetting before learning: finds the forgetting rate on one task vector, then learns.

Run ``python examples/forgetting.py`` (a tiny model, seconds), or with ``--model smollm2``.
"""

from __future__ import annotations

import argparse
from typing import Any

from lightning.pytorch import Callback, Trainer

import lightning_edit as le
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.forgetting.subtract import load_task_vector, sweep_forgetting

VECTOR = "runs/f_learning/task_vector"


def load(name: str) -> tuple[Any, Any]:
    tiny = name == "tiny"
    return trained_tiny_model() if tiny else (le.load_model(name), le.load_tokenizer(name))


def tune(name: str, data: le.EditDataModule, lr: float, *callbacks: Callback) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plain: Any = {"enable_checkpointing": False, "limit_val_batches": 0, **quiet}
    trainer = Trainer(max_epochs=3, callbacks=list(callbacks), **plain)
    trainer.fit(le.FullTuning.from_model(*load(name), lr=lr), data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="`tiny`, `smollm2`, a folder or a hub id")
    name = parser.parse_args().model
    lr = 2e-3 if name == "tiny" else 5e-5
    facts = tiny_requests(4) if name == "tiny" else le.Facts(demo=True).requests
    new = le.EditDataModule(requests=facts, batch_size=4)
    old = le.EditDataModule(requests=new.old_requests, batch_size=4)

    tune(name, old, lr, le.SaveTaskVector(VECTOR))  # once more what the model knows

    model, tokenizer = load(name)
    evaluator = le.Evaluator(model, le.PromptTokenizer(tokenizer), readings=["teacher_forced"])
    before = evaluator.baseline(old.requests)

    def measure() -> dict[str, float]:
        found = evaluator.evaluate(old.requests, before)
        return {m: found.mean(f"{m}/teacher_forced")[0] for m in ("reliability", "locality")}

    for row in sweep_forgetting(model, load_task_vector(VECTOR, model), [0, 0.3, 1, 3], measure):
        print("rate {rate:g}: old answers {reliability:.2f}, locality {locality:.2f}".format(**row))

    found = le.EditEvaluator()  # before the forgetting, to measure the model as it was
    tune(name, new, lr, found, le.TaskVectorForgetting(VECTOR, rate=0.3))
    for metric in ("reliability", "generality", "locality"):
        figures = found.rows[f"{metric}/autoregressive"]
        print(f"new answers, {metric}: {figures.before:.2f} → {figures.after:.2f}")
