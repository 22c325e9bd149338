# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Trains MEND on some facts, then edits with it a fact that it has not seen, and undoes it.

Run ``python examples/train_mend.py`` (a tiny model, seconds), or with ``--model smollm2`` and
``--train zsre_mend_train.json``.
"""

from __future__ import annotations

import argparse
from typing import Any

from lightning.pytorch import Trainer

import lightning_edit as le
from lightning_edit.demos import tiny_requests, trained_tiny_model


def load(name: str) -> tuple[Any, Any]:
    tiny = name == "tiny"
    return trained_tiny_model() if tiny else (le.load_model(name), le.load_tokenizer(name))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="`tiny`, `smollm2`, a folder or a hub id")
    parser.add_argument("--train", help="zsRE to learn from; the tiny world's facts if left out")
    arguments = parser.parse_args()
    facts = tiny_requests(24)
    train: le.EditDataModule = le.EditDataModule(requests=facts[4:], batch_size=4)
    if arguments.train:
        train = le.ZsRE(path=arguments.train, batch_size=4, skip_invalid=True)
    unseen = le.EditDataModule(requests=facts[:4])

    settings: dict[str, Any] = {}
    if arguments.model == "tiny":  # few and small steps would teach a tiny network nothing
        settings = {"rank": 32, "lr": 3e-4, "edit_lr": 0.02, "edit_lr_lr": 5e-3}
    editor = le.MEND.from_model(*load(arguments.model), **settings)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    plain: Any = {"logger": False, "enable_checkpointing": False, **quiet}
    epochs = 20 if arguments.model == "tiny" else 1
    trainer = Trainer(
        max_epochs=epochs, check_val_every_n_epoch=epochs, gradient_clip_val=100, **plain
    )
    trainer.fit(editor, le.HeldOut(train, unseen))
    trainer.save_checkpoint("runs/mend.ckpt")
    for name in ("reliability", "generality", "locality"):
        found = trainer.callback_metrics[f"val/{name}/teacher_forced"]
        print(f"unseen facts, {name}: {found:.2f}")

    model, tokenizer = load(arguments.model)
    trained = le.TrainedEditor.from_model(model, tokenizer, checkpoint="runs/mend.ckpt")
    edit = trained.edit(unseen.requests[0])
    print(edit)
    prompt = unseen.requests[0].prompt
    print("before:", *trained.evaluator.continuations([prompt]))
    with edit.applied(model):
        print("edited:", *trained.evaluator.continuations([prompt]))
    print("undone:", *trained.evaluator.continuations([prompt]))
