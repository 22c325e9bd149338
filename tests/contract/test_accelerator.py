# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Editors of a model that lies on an accelerator find there what they find on the CPU.

Skipped but under ``TEST_ACCELERATOR=gpu make test``, where all other tests' Trainers use it, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_edit import CaliNET, EditModule, WeightDelta
from lightning_edit.core.hashing import weight_hash
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.evaluation.scoring import continuations
from lightning_edit.modules.learning import LearningModule
from tests.contract.enumeration import EDITORS, LEARNERS, RememberingEditor, quick, quick_editor
from tests.modules.helpers import bare_trainer, fingerprint, load_edit, same_edit
from tests.runs import ACCELERATOR

pytestmark = [
    pytest.mark.skipif(ACCELERATOR == "cpu", reason="TEST_ACCELERATOR names no accelerator"),
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
]


@pytest.fixture(params=[*EDITORS, RememberingEditor.__name__])
def cls(request: pytest.FixtureRequest) -> type[EditModule]:
    return EDITORS.get(request.param, RememberingEditor)


@pytest.fixture(params=LEARNERS)
def learner(request: pytest.FixtureRequest) -> type[LearningModule[Any]]:
    return LEARNERS[request.param]


@pytest.fixture(autouse=True)
def _no_group_left() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    found = torch.accelerator.current_accelerator()
    assert found is not None, "TEST_ACCELERATOR names an accelerator, and there is none"
    return found


def on_device(cls: type[EditModule]) -> Any:
    model, tokenizer = trained_tiny_model()
    return cls.from_model(model.to(device()), tokenizer, **quick(cls))


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
    assert_close(edit, plain.edit(tiny_requests(2)), 0.02)
    edit.save(tmp_path / "edit")
    there = load_edit(tmp_path / "edit")
    assert same_edit(load_edit(tmp_path / "edit"), there)
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


def test_one_process_of_a_group_edits_as_one_alone(cls: type[EditModule], tmp_path: Path) -> None:
    if cls.__name__ == CaliNET.__name__:
        pytest.skip("CaliNET trains its slots outside of groups")
    edits = []
    for strategy in ("auto", "ddp"):
        editor = quick_editor(cls)
        data = EditDataModule(requests=tiny_requests(5), batch_size=2)
        trainer = bare_trainer(
            max_epochs=1, strategy=strategy, inference_mode=False, limit_val_batches=1.0
        )
        trainer.fit(editor, datamodule=data)
        trainer.validate(editor, datamodule=data, verbose=False)
        edits.append(editor.committed())
        edits[-1].revert_(editor.model)
        assert weight_hash(editor.model) == editor.base.sha256
    assert_close(edits[1], edits[0], 1e-3)


def test_a_network_trained_there_edits_here(
    learner: type[LearningModule[Any]], tmp_path: Path
) -> None:
    edits = []
    for accelerator in ("cpu", ACCELERATOR):
        editor = quick_editor(learner)
        trainer = bare_trainer(max_epochs=1, accelerator=accelerator, limit_val_batches=1.0)
        data = EditDataModule(requests=tiny_requests(4), batch_size=2)
        trainer.fit(editor, datamodule=data)
        trainer.save_checkpoint(tmp_path / "editor.ckpt")
        here, there = quick_editor(learner), on_device(learner)
        for one in (here, there):
            one.load_editor(tmp_path / "editor.ckpt")
        request = tiny_requests(1)[0]  # KE makes one edit at a time
        edits += [here.edit(request), there.edit(request)]
    for edit in edits[1:]:
        assert_close(edit, edits[0], 0.05)
