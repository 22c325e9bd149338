# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits and checkpoints that an earlier version wrote are loaded, applied, reverted, resumed.

Version 0.1.0 wrote them with the tiny model that comes with the package: ROME, MEMIT and GRACE
stopped after two of four requests, CaliNET and LoRATuning after one epoch over two, MEND after one
step over four.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_edit import (
    GRACE,
    MEMIT,
    MEND,
    ROME,
    CaliNET,
    Edit,
    EditDataModule,
    LoRATuning,
    TrainedEditor,
    WeightDelta,
)
from lightning_edit.demos import tiny_requests, trained_tiny_model
from tests.modules.helpers import bare_trainer, same, snapshot

FOLDER = Path(__file__).parent / "written_before" / "0.1.0"
CONTEXTS = {"context_templates": ["{}", "Yes. {}"], "tokens_per_dimension": 1, "steps": 5}
# Class, settings, requests, and requests a batch.
RUNS: dict[str, tuple[Any, dict[str, Any], int, int]] = {
    "rome": (ROME, {"layers": [1], **CONTEXTS}, 4, 1),
    "memit": (MEMIT, {"layers": [1, 2], "aligned": True, **CONTEXTS}, 4, 1),
    "grace": (GRACE, {"steps": 5}, 4, 1),
    "calinet": (CaliNET, {"slots": 2, "steps": 3}, 2, 2),
    "lora_tuning": (LoRATuning, {"layers": [2], "rank": 2, "lr": 1e-2}, 2, 2),
}


def test_a_saved_edit_is_applied_and_reverted() -> None:
    for name in RUNS:
        model, tokenizer = trained_tiny_model()
        before = snapshot(model)
        ids = tokenizer(tiny_requests(1)[0].prompt, return_tensors="pt").input_ids
        answer = model(ids).logits
        edit = Edit.load(FOLDER / name / "delta")
        assert len(edit.provenance.request_ids) == 2, name
        edit.apply_(model)
        assert isinstance(edit, WeightDelta) == (not same(model, before)), name
        assert not torch.equal(model(ids).logits, answer), name
        edit.revert_(model)
        assert same(model, before), name
        assert torch.equal(model(ids).logits, answer), name


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_its_checkpoint(name: str) -> None:
    cls, settings, count, batch_size = RUNS[name]
    model, tokenizer = trained_tiny_model()
    before = snapshot(model)
    editor = cls.from_model(model, tokenizer, **settings)
    requests = tiny_requests(count)
    trainer = bare_trainer(max_epochs=2)
    data = EditDataModule(requests=requests, batch_size=batch_size)
    trainer.fit(editor, data, ckpt_path=FOLDER / name / "run.ckpt", weights_only=True)
    # Two edits are in the model already, and not made again.
    assert trainer.global_step == (count if batch_size == 1 else 2)
    edit = editor.committed()
    assert set(edit.provenance.request_ids) == {request.id for request in requests}
    assert {row["id"] for row in editor.history} == {request.id for request in requests}
    if isinstance(edit, WeightDelta):
        edit.revert_(model)
        assert same(model, before)


def test_a_trained_editor_edits() -> None:
    model, tokenizer = trained_tiny_model()
    before = snapshot(model)
    checkpoint = str(FOLDER / "mend" / "run.ckpt")
    editor = TrainedEditor.from_model(model, tokenizer, checkpoint=checkpoint)
    edit = editor.edit(tiny_requests(1))
    assert edit.norm() > 0
    assert same(model, before)
    mend = MEND.from_model(model, tokenizer, rank=2, layers=[3], modules=["mlp_out"])
    mend.load_editor(checkpoint)
    assert mend.edit(tiny_requests(1)).norm() == pytest.approx(edit.norm(), rel=1e-4)
