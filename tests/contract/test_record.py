# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What the weights hold is what the record says: nothing that somebody wrote is lost unsaid."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lightning_edit import (
    CaliNET,
    Edit,
    EditDataModule,
    EditModule,
    WeightDelta,
    load_model,
)
from lightning_edit.core.errors import ArtifactError, EditError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.demos import tiny_model, tiny_requests
from lightning_edit.modules.fine_tuning.tuning import TuningModule
from tests.contract.enumeration import EDITORS, quick_editor
from tests.modules.helpers import bare_trainer, fingerprint, same_edit

pytestmark = [
    # Keys of a tiny model are alike, and its weights few; editors say so.
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*survives rounding:UserWarning"),
]


# Those that `fit` trains find their change in the weights, whoever wrote it.
TRAINED: dict[str, Any] = {
    n: c for n, c in EDITORS.items() if issubclass(c, (TuningModule, CaliNET))
}


@pytest.fixture(params=[name for name in EDITORS if name not in TRAINED], scope="module")
def cls(request: pytest.FixtureRequest) -> type[EditModule]:
    return EDITORS[request.param]


@pytest.fixture(scope="module")
def edited(cls: type[EditModule]) -> tuple[Any, Any]:
    """An editor, and its edit of a request, which is not applied; both as they were afterwards."""
    editor = quick_editor(cls)
    return editor, editor.edit(tiny_requests(1))


@pytest.fixture
def weights_only(edited: tuple[Any, Any]) -> None:
    if not isinstance(edited[1], WeightDelta):
        pytest.skip("what a memory holds is its own record")


@pytest.fixture(scope="module")
def committed(cls: type[EditModule], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """An editor that committed two edits in a fit, and a checkpoint of its weights alone."""
    editor, folder = quick_editor(cls), tmp_path_factory.mktemp("committed")
    saving = ModelCheckpoint(folder, "weights", save_weights_only=True, every_n_epochs=1)
    fit(editor, tiny_requests(2), callbacks=[saving], enable_checkpointing=True)
    return editor, folder / "weights.ckpt"


def fit(editor: EditModule, requests: list[Any], **settings: Any) -> Trainer:
    trainer = bare_trainer(max_epochs=1, inference_mode=False, **settings)
    trainer.fit(editor, EditDataModule(requests=requests))
    return trainer


def write_over(edit: Any, model: torch.nn.Module) -> None:
    """Something else writes to what an edit has written."""
    name = next(name for name, change in edit.changes.items())
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5)


def test_an_edit_is_taken_out_only_where_it_stands(
    edited: tuple[Any, Any], tmp_path: Path, weights_only: None
) -> None:
    editor, edit = edited
    model, before = editor.model, fingerprint(editor.model)
    edit.apply_(model)
    loaded = Edit.load(edit.save(tmp_path))
    # In a model that never had it, and in one to which something else has written since.
    other = tiny_model(seed=3)
    with torch.no_grad():
        for name in edit.changes:
            other.get_parameter(name).add_(1)
    changed = copy.deepcopy(model)
    write_over(edit, changed)
    for one in (edit, loaded):
        for there in (other, changed):
            stood = fingerprint(there)
            with pytest.raises(ArtifactError, match=r"not the tensor that this edit wrote"):
                one.revert_(there)
            assert fingerprint(there) == stood
    loaded.revert_(model)
    assert fingerprint(model) == before


def test_what_something_else_wrote_is_never_written_over(
    edited: tuple[Any, Any], weights_only: None
) -> None:
    editor, edit = edited
    model, before = editor.model, fingerprint(editor.model)
    edit.apply_(model)
    stood = fingerprint(model)
    trainer = bare_trainer(max_epochs=1, inference_mode=False, limit_val_batches=None)
    data = EditDataModule(requests=tiny_requests(1))
    for what in (
        lambda: editor.base_weights(),
        lambda: editor.committed(),
        lambda: editor.session.commit(edit),
        lambda: editor.commit(edit),
        lambda: trainer.validate(editor, data, verbose=False),
        lambda: trainer.test(editor, data, verbose=False),
        lambda: trainer.predict(editor, data),
        lambda: trainer.fit(editor, data),
    ):
        with pytest.raises(EditError, match=r"something else wrote to it.*revert_.*commit"):
            what()
        assert fingerprint(model) == stood
        assert not len(editor.delta)
        assert not editor.history
    edit.revert_(model)
    assert fingerprint(model) == before
    with editor.base_weights():
        assert fingerprint(model) == before


def test_edits_stack_on_what_they_were_made_of(cls: type[EditModule]) -> None:
    editor = quick_editor(cls)
    model, before = editor.model, fingerprint(editor.model)
    first, second = tiny_requests(2)
    early, one = editor.edit([second]), editor.edit([first])
    one.apply_(model)
    two = editor.edit([second])
    if isinstance(two, WeightDelta):
        two.apply_(model)  # by hand, one on the other
        with pytest.raises(ArtifactError, match=r"Undo later\s+edits first"):
            one.revert_(model)
        two.revert_(model)
        one.revert_(model)
        assert fingerprint(model) == before
        with pytest.raises(ArtifactError, match="another model, or it has been edited already"):
            two.apply_(model)
        assert fingerprint(model) == before
        editor.commit(editor.edit([first]))
        stood = fingerprint(model)
        with pytest.raises(EditError, match="does not reckon with what was committed since"):
            editor.commit(early)
        assert fingerprint(model) == stood
    else:
        one.revert_(model)
        editor.commit(one)
    editor.commit(editor.edit([second]))
    assert [row["id"] for row in editor.history] == [first.id, second.id]
    assert editor.committed().provenance.request_ids == (first.id, second.id)


@pytest.mark.parametrize("name", TRAINED)
def test_what_fit_trains_commits_no_edits(name: str) -> None:
    editor = quick_editor(TRAINED[name])
    edit, before = editor.edit(tiny_requests(1)), fingerprint(editor.model)
    with pytest.raises(EditError, match=r"`Trainer.fit` trains it.*apply_"):
        editor.commit(edit)
    assert fingerprint(editor.model) == before
    edit.apply_(editor.model)
    edit.revert_(editor.model)
    assert fingerprint(editor.model) == before


def test_commits_in_plain_python_are_those_of_a_fit(
    cls: type[EditModule], committed: tuple[Any, Path]
) -> None:
    editor = quick_editor(cls)
    for request in tiny_requests(2):
        editor.commit(editor.edit(request))
    assert fingerprint(editor.model) == fingerprint(committed[0].model)
    assert same_edit(editor.committed(), committed[0].committed())


def test_a_checkpoint_of_weights_alone_holds_the_edits(
    cls: type[EditModule], committed: tuple[Any, Path], tmp_path: Path
) -> None:
    one, checkpoint = committed
    editor = quick_editor(cls)
    trainer = bare_trainer(inference_mode=False, limit_val_batches=None)
    data = EditDataModule(requests=tiny_requests(2))
    trainer.validate(editor, data, ckpt_path=checkpoint, verbose=False)
    assert fingerprint(editor.model) == fingerprint(one.model)
    assert same_edit(editor.committed(), one.committed())
    more = [*tiny_requests(3)[2:]]
    fit(editor, more)
    assert editor.committed().provenance.request_ids == tuple(r.id for r in tiny_requests(3))
    with editor.base_weights():
        assert weight_hash(editor.model) == weight_hash(quick_editor(cls).model)


def test_a_checkpoint_that_lacks_the_edits_is_gone_on_with_by_nobody(
    cls: type[EditModule], committed: tuple[Any, Path], tmp_path: Path, weights_only: None
) -> None:
    edited, file = committed
    state = torch.load(file, weights_only=True)
    for key in ("edits", "format_version", "sha256"):  # as they were written before
        del state["lightning_edit"][key]
    weights = {f"model.{name}": p.detach() for name, p in edited.model.named_parameters()}
    state["state_dict"] |= edited.target.kept(weights)
    torch.save(state, tmp_path / "old.ckpt")
    editor = quick_editor(cls)
    trainer = bare_trainer(inference_mode=False, limit_val_batches=None)
    data = EditDataModule(requests=tiny_requests(1))
    for verb in (trainer.validate, trainer.test):
        with pytest.raises(EditError, match="a checkpoint without the edits"):
            verb(editor, data, ckpt_path=tmp_path / "old.ckpt", verbose=False)


def test_a_copy_of_an_edited_model_keeps_its_edit(edited: tuple[Any, Any]) -> None:
    editor, edit = edited
    model, before = editor.model, fingerprint(editor.model)
    ids = editor.tokens.tokenizer(tiny_requests(1)[0].prompt, return_tensors="pt").input_ids
    edit.apply_(model)
    stood, answer = fingerprint(model), model.generate(ids, max_new_tokens=4, do_sample=False)
    copied = copy.deepcopy(model)
    edit.revert_(model)
    for _ in range(2):  # of a copy, and of a copy of it
        assert fingerprint(copied) == stood
        assert torch.equal(copied.generate(ids, max_new_tokens=4, do_sample=False), answer)
        copied = copy.deepcopy(copied)
    edit.revert_(copied)
    assert fingerprint(copied) == fingerprint(model) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in copied.modules())


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averaged_weights_are_no_edit(cls: type[EditModule]) -> None:
    editor = quick_editor(cls)
    before = fingerprint(editor.model)
    with pytest.raises(EditError, match="EMAWeightAveraging averages weights over steps"):
        fit(editor, tiny_requests(2), callbacks=[EMAWeightAveraging(decay=0.5)])
    assert fingerprint(editor.model) == before


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_processes_that_keep_the_record_are_refused(strategy: str) -> None:
    editor = quick_editor(EDITORS["ROME"])
    editor.trainer = bare_trainer(strategy=strategy, devices=2)
    with pytest.raises(EditError, match=r"without the record of what changed them.*'ddp'"):
        editor.setup("fit")
    editor.setup("validate")


@pytest.mark.filterwarnings("ignore:.max_epochs. was not set")
def test_a_request_that_is_in_the_model_is_not_made_again(cls: type[EditModule]) -> None:
    editor, (first, second) = quick_editor(cls), tiny_requests(2)
    data = EditDataModule(requests=[first])
    trainer = bare_trainer(inference_mode=False, max_epochs=None, max_steps=-1)
    trainer.fit(editor, data)  # without a number of epochs
    assert (trainer.current_epoch, len(editor.history)) == (1, 1)
    stood, edit = fingerprint(editor.model), editor.committed()
    for settings in ({"max_epochs": 2}, {"max_epochs": 3, "overfit_batches": 1}):
        bare_trainer(inference_mode=False, **settings).fit(editor, data)
        assert fingerprint(editor.model) == stood
    fit(editor, [first, second])
    assert [row["id"] for row in editor.history] == [first.id, second.id]
    # What has the id alone in common is another request, and asked for again it is made again.
    other = replace(first, target_new=second.target_new, target_old=None, id=first.id)
    fit(editor, [other])
    assert len(editor.history) == 3
    asked = quick_editor(cls, repeat_requests=True)
    bare_trainer(inference_mode=False, max_epochs=2).fit(asked, data)
    assert [row["id"] for row in asked.history] == [first.id, first.id]
    assert not same_edit(asked.committed(), edit) or not isinstance(edit, WeightDelta)


def test_a_saved_model_comes_with_its_edit(edited: tuple[Any, Any], tmp_path: Path) -> None:
    editor, edit = edited
    ids = editor.tokens.tokenizer(tiny_requests(1)[0].prompt, return_tensors="pt").input_ids
    with edit.applied(editor.model):
        editor.model.save_pretrained(tmp_path)
        stood, logits = fingerprint(editor.model), editor.model(ids).logits
    loaded = load_model(str(tmp_path))
    assert fingerprint(loaded) == stood
    assert torch.equal(loaded(ids).logits, logits)
    edit.revert_(loaded)
    assert fingerprint(loaded) == fingerprint(editor.model)
