# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits and checkpoints that an earlier version wrote are loaded, applied, reverted, resumed.

Version 0.1.0 wrote them with the tiny model that comes with the package: ROME, MEMIT and GRACE
stopped after two of four requests, CaliNET and LoRATuning after one epoch over two, MEND after one
step over four, MALMEN after ten over the same eight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lightning_edit import (
    GRACE,
    MALMEN,
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


def test_malmen_edits_as_it_did_with_so_many_facts_and_better_with_fewer() -> None:
    """Gradients were of a pass's mean; the eight facts of its training have 15 target tokens."""
    model, tokenizer = trained_tiny_model()
    checkpoint = FOLDER / "malmen" / "run.ckpt"
    editor = TrainedEditor.from_model(model, tokenizer, checkpoint=str(checkpoint))
    assert cast(Any, editor.network).divisor == 15
    # Version 0.1.0 made edits of these sizes of eight facts and of one.
    assert editor.edit(tiny_requests(8)).norm() == pytest.approx(8.236, rel=1e-2)
    assert editor.edit(tiny_requests(1)).norm() < 0.2 * 61.09
    settings: dict[str, Any] = {"rank": 2, "blocks": 1, "layers": [3]}
    malmen = MALMEN.from_model(model, tokenizer, **settings)
    malmen.load_editor(checkpoint)
    resumed = MALMEN.from_model(model, tokenizer, **settings)
    data = EditDataModule(requests=tiny_requests(8), batch_size=8)
    trainer = bare_trainer(max_epochs=11)
    trainer.fit(resumed, data, ckpt_path=checkpoint, weights_only=True)
    assert trainer.global_step == 11
    for one in (malmen, resumed):
        assert float(one.network.divisor) == 15


def test_passes_of_an_unknown_size_are_told(tmp_path: Path) -> None:
    model, tokenizer = trained_tiny_model()
    saved = torch.load(FOLDER / "malmen" / "run.ckpt", weights_only=True)
    del saved["loops"]
    torch.save(saved, tmp_path / "run.ckpt")
    with pytest.warns(UserWarning, match="does not tell how large the passes"):
        editor = TrainedEditor.from_model(model, tokenizer, checkpoint=str(tmp_path / "run.ckpt"))
    assert editor.edit(tiny_requests(8)).norm() == pytest.approx(8.236, rel=1e-2)


def test_mend_averages_over_the_requests_of_an_edit_if_it_was_trained_so(tmp_path: Path) -> None:
    model, tokenizer = trained_tiny_model()
    saved = torch.load(FOLDER / "mend" / "run.ckpt", weights_only=True)
    settings = saved["lightning_edit"]["editor"]["settings"]
    for edits_at_once, averages in ((1, False), (4, True), (None, True)):
        settings["edits_at_once"] = edits_at_once
        path = tmp_path / f"{edits_at_once}.ckpt"
        torch.save(saved, path)
        trained: Any = TrainedEditor.from_model(model, tokenizer, checkpoint=str(path)).trained
        assert trained.gradient_of == ("edit" if averages else "mean")
    mend = MEND.from_model(model, tokenizer, rank=2, layers=[3], modules=["mlp_out"])
    with pytest.warns(UserWarning, match="Here they add up. Set `average=True`"):
        mend.load_editor(tmp_path / "4.ckpt")
