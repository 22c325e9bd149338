# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors of a model that lies on an accelerator find there what they find on the CPU.

Skipped but under ``TEST_ACCELERATOR=gpu``, or any other name that a Trainer knows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_edit import CaliNET, CausalTracing, Edit, EditCheckpoint, EditModule, WeightDelta
from lightning_edit.core.hashing import weight_hash
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.evaluation.scoring import continuations
from tests.contract.enumeration import (
    CONFIGS,
    EDITORS,
    LEARNERS,
    METHOD_CONFIGS,
    RememberingEditor,
    class_in,
    quick,
    quick_editor,
)
from tests.modules.helpers import bare_trainer, fingerprint
from tests.runs import TinyWorld, run_here

ACCELERATOR = os.environ.get("TEST_ACCELERATOR", "")

# Rows that are left out of a loss, or not, by a margin: another rounding takes another way.
UNSTEADY = ("TPatcher", "WISE")

pytestmark = [
    pytest.mark.skipif(not ACCELERATOR, reason="TEST_ACCELERATOR names no accelerator"),
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    # What is compared is made on the CPU beside it.
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    # Parameters that were trained before are trained again on the stream of a group.
    pytest.mark.filterwarnings(
        "ignore:The AccumulateGrad node's stream does not match:UserWarning"
    ),
]


@pytest.fixture(params=[*EDITORS, RememberingEditor.__name__])
def cls(request: pytest.FixtureRequest) -> type[EditModule]:
    return EDITORS.get(request.param, RememberingEditor)


@pytest.fixture(params=LEARNERS)
def learner(request: pytest.FixtureRequest) -> Any:
    return LEARNERS[request.param]


@pytest.fixture(autouse=True)
def _no_group_left() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    if ACCELERATOR == "cpu":
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator()
    assert found is not None, "TEST_ACCELERATOR names an accelerator, and there is none"
    return found


def on_device(cls: type[EditModule]) -> Any:
    model, tokenizer = trained_tiny_model()
    return cls.from_model(model.to(device()), tokenizer, **quick(cls))


def data_of(n: int = 5) -> EditDataModule:
    return EditDataModule(requests=tiny_requests(n), batch_size=2, eval_batch_size=2)


def tensors_of(edit: Any) -> dict[str, Tensor]:
    if isinstance(edit, WeightDelta):
        return {name: edit.dense(name).cpu() for name in edit.changes}
    return {
        f"{name}.{field}": tensor.cpu()
        for name, entry in edit.entries.items()
        for field, tensor in entry.tensors.items()
    }


def assert_close(found: Any, wanted: Any, tolerance: float) -> None:
    one, other = tensors_of(found), tensors_of(wanted)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        if not tensor.is_floating_point():
            assert torch.equal(one[name], tensor), name
            continue
        difference = (one[name].double() - tensor.double()).norm()
        assert difference <= tolerance * tensor.double().norm(), name


def answers(editor: Any) -> tuple[list[str], list[float]]:
    """What the model says, and how likely it finds the new answers."""
    requests = tiny_requests(3)
    texts = continuations(editor.model, editor.tokens, [r.prompt for r in requests])
    probes = editor.evaluator.evaluate(requests, editor.evaluator.baseline(requests)).probes
    return [text.text for text in texts], [float(p.nll_new) for p in probes if p.nll_new]


def test_an_edit_is_that_of_the_cpu_and_goes_from_one_to_the_other(
    cls: type[EditModule], tmp_path: Path
) -> None:
    editor, plain = on_device(cls), quick_editor(cls)
    base = fingerprint(editor.model)
    edit = editor.edit(tiny_requests(2))
    assert fingerprint(editor.model) == base
    if cls.__name__ not in UNSTEADY:
        assert_close(edit, plain.edit(tiny_requests(2)), 0.02)
    edit.save(tmp_path / "edit")
    there = Edit.load(tmp_path / "edit")
    with edit.applied(editor.model):
        assert fingerprint(editor.model) != base
        texts, scores = answers(editor)
    assert fingerprint(editor.model) == base
    with there.applied(plain.model):
        found = answers(plain)
    assert found[0] == texts
    assert found[1] == pytest.approx(scores, rel=1e-3, abs=1e-4)
    assert fingerprint(plain.model) == base
    # Moved while it is edited, it goes back all the same.
    there.apply_(editor.model)
    editor.model.cpu()
    assert answers(editor)[0] == texts
    there.revert_(editor.model)
    assert fingerprint(editor.model) == base


def test_an_editor_goes_where_its_model_goes(cls: type[EditModule]) -> None:
    editor = quick_editor(cls)
    requests = tiny_requests(3)
    here = editor.edit(requests[:1])
    editor.edit_optimizer.stage(here)
    editor.edit_optimizer.step()
    editor.to(device())
    there = editor.edit(requests[1:2])
    editor.edit_optimizer.stage(there)
    editor.edit_optimizer.step()
    texts = answers(editor)[0]
    editor.cpu()
    assert answers(editor)[0] == texts
    assert editor.edit(requests[2:]).norm() > 0
    editor.committed().revert_(editor.model)
    assert weight_hash(editor.model) == editor.base.sha256


def test_a_run_is_resumed_and_measured_on_either(cls: type[EditModule], tmp_path: Path) -> None:
    def trainer_of(accelerator: str, **settings: Any) -> Trainer:
        return bare_trainer(
            accelerator=accelerator,
            max_epochs=1,
            callbacks=[EditCheckpoint(str(tmp_path))],
            enable_checkpointing=True,
            default_root_dir=tmp_path,
            inference_mode=False,
            **settings,
        )

    def fit(accelerator: str, **settings: Any) -> Any:
        editor, last = quick_editor(cls), tmp_path / "last.ckpt"
        trainer = trainer_of(accelerator, **settings)
        trainer.fit(editor, datamodule=data_of(), ckpt_path=last if last.is_file() else None)
        return editor

    fit("cpu", max_steps=1)
    fit(ACCELERATOR, max_steps=2)
    edited = fit("cpu")
    assert [row["id"] for row in edited.history] == [r.id for r in tiny_requests(5)]
    for accelerator in ("cpu", ACCELERATOR):
        fresh = quick_editor(cls, test_protocol="sequential")
        [found] = trainer_of(accelerator).test(
            fresh, datamodule=data_of(3), ckpt_path=tmp_path / "last.ckpt", verbose=False
        )
        assert set(found) >= {"test/reliability/autoregressive"}
        fresh.committed().revert_(fresh.model)
        assert weight_hash(fresh.model) == fresh.base.sha256


def test_one_process_of_a_group_edits_as_one_alone(cls: type[EditModule]) -> None:
    if cls.__name__ == CaliNET.__name__:
        pytest.skip("CaliNET trains its slots outside of groups")
    edits = []
    for strategy in ("auto", "ddp"):
        editor = quick_editor(cls)
        trainer = bare_trainer(
            accelerator=ACCELERATOR,
            devices=1,
            max_epochs=1,
            strategy=strategy,
            inference_mode=False,
            limit_val_batches=1.0,
        )
        with patch.dict(os.environ):  # Lightning names ranks there, which others would inherit
            trainer.fit(editor, datamodule=data_of())
            trainer.validate(editor, datamodule=data_of(), verbose=False)
        edits.append(editor.committed())
        edits[-1].revert_(editor.model)
        assert weight_hash(editor.model) == editor.base.sha256
    assert_close(edits[1], edits[0], 1e-3)


def test_a_network_trained_there_edits_here(learner: Any, tmp_path: Path) -> None:
    edits = []
    for accelerator in ("cpu", ACCELERATOR):
        editor = quick_editor(learner)
        trainer = bare_trainer(max_epochs=1, accelerator=accelerator, limit_val_batches=1.0)
        trainer.fit(editor, data_of(4))
        trainer.save_checkpoint(tmp_path / "editor.ckpt")
        here, there = quick_editor(learner), on_device(learner)
        for one in (here, there):
            one.load_editor(tmp_path / "editor.ckpt")
        request = tiny_requests(1)[0]  # KE makes one edit at a time
        edits += [here.edit(request), there.edit(request)]
    for edit in edits[1:]:
        assert_close(edit, edits[0], 0.05)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"), n=3)


@pytest.mark.parametrize("path", METHOD_CONFIGS, ids=lambda path: str(path.stem))
def test_a_method_runs_from_its_configuration(
    world: TinyWorld, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = class_in(path)
    cls = {**EDITORS, **LEARNERS}[name]
    settings = quick(cls)
    if "checkpoint" not in settings and "layers" not in cls.unused_arguments:
        settings["layers"] = [1]
    words = [
        f"--model.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    ]
    words += [f"--model.model={world.model}", f"--trainer.accelerator={ACCELERATOR}"]
    if name in LEARNERS:
        words.append("--data=HeldOut")
        for part in ("train", "held_out"):
            words += [f"--data.{part}=EditDataModule", f"--data.{part}.path={world.requests}"]
        trainer = "hypernetwork"
    else:
        words += [f"--model.cache_dir={tmp_path}", "--data=EditDataModule"]
        words.append(f"--data.path={world.requests}")
        trainer = "default"
    files = [CONFIGS / "trainer" / f"{trainer}.yaml", path]
    configs = [part for file in files for part in ("-c", str(file))]
    assert run_here(["fit", *configs, *words]) == 0
    if name in EDITORS:
        edit = Edit.load(tmp_path / "runs/edit/delta")
        assert edit.norm() > 0
        assert edit.provenance.method == name


def test_causal_tracing_is_that_of_the_cpu(tmp_path: Path) -> None:
    found = []
    for accelerator in ("cpu", ACCELERATOR):
        tracing = CausalTracing(samples=2, window=2, count=2)
        trainer = bare_trainer(
            accelerator=accelerator,
            max_epochs=1,
            limit_train_batches=1,
            callbacks=[tracing],
            default_root_dir=tmp_path,
        )
        trainer.fit(quick_editor(EDITORS["FineTune"]), datamodule=data_of(2))
        assert tracing.result is not None
        found.append(tracing.result)
    for one, other in zip(found[0].facts, found[1].facts, strict=True):
        for kind, scores in one.scores.items():
            torch.testing.assert_close(other.scores[kind], scores, rtol=1e-3, atol=1e-4)
