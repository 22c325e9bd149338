# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Requests are taken out of a model as if they had never been committed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from lightning_edit import ROME, EditBatch, EditDataModule, EditModule, WeightDelta
from lightning_edit.core.errors import EditError, FailedRequestsError
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer
from tests.contract.enumeration import EDITORS, HYPERNETWORKS, RememberingEditor, quick_editor
from tests.contract.test_record import TRAINED
from tests.modules.helpers import bare_trainer, fingerprint, same_edit

pytestmark = [
    # Keys of a tiny model are alike, and its weights few; editors say so.
    pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*survives rounding:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path"),
]

#: Editors whose edits, of weights or of a memory, stand on one another.
REPLAYED: dict[str, Any] = {
    **{name: cls for name, cls in EDITORS.items() if name not in TRAINED},
    "SERAC": RememberingEditor,
}


@pytest.fixture(params=REPLAYED, scope="module")
def cls(request: pytest.FixtureRequest) -> Any:
    return REPLAYED[request.param]


def committed(cls: type[EditModule], *batches: list[Any]) -> Any:
    """An editor that committed batches of requests."""
    editor = quick_editor(cls)
    for batch in batches:
        editor.commit(editor.edit(batch))
    return editor


def record(editor: Any) -> tuple[Any, ...]:
    """All that an editor knows of what it committed."""
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in editor.history]
    carried = {name: tensor.tolist() for name, tensor in editor.carried.items()}
    ids = editor.committed().provenance.request_ids
    return fingerprint(editor.model), history, carried, ids, editor.delta.batches


def test_without_the_middle_one_the_model_is_as_if_it_had_never_been_asked_for(
    cls: type[EditModule],
) -> None:
    one, two, three, four = tiny_requests(4)
    for batches, gone, left in (
        ([[one], [two], [three]], [two], [[one], [three]]),
        ([[one, two, three], [four]], [two], [[one, three], [four]]),
        ([[one, two]], [one, two], []),
    ):
        editor, wanted = committed(cls, *batches), committed(cls, *left)
        known = editor.committed().provenance.requests
        assert known == tuple(r.fact() for batch in batches for r in batch)
        stood = fingerprint(editor.model)
        edit = editor.remove([request.id for request in gone])
        assert edit.provenance.request_ids == tuple(request.id for request in gone)
        assert record(editor) == record(wanted)
        assert same_edit(editor.committed(), wanted.committed())
        if isinstance(edit, WeightDelta):
            with editor.base_weights():
                assert fingerprint(editor.model) == fingerprint(quick_editor(cls).model)
        edit.revert_(editor.model)
        assert fingerprint(editor.model) == stood


def test_what_fails_in_the_middle_leaves_all_as_it_was(
    cls: type[EditModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = tiny_requests(3)
    editor = committed(cls, *([request] for request in requests))
    before = record(editor)
    with pytest.raises(EditError, match=r"[Nn]o (request|edit) with the id 'nobody'"):
        editor.remove([requests[0].id, "nobody"])
    assert record(editor) == before
    compute = editor.compute_edit
    for failure in (EditError("It fails."), KeyboardInterrupt()):
        made: list[Any] = []

        def failing(batch: Any, failure: BaseException = failure, made: list[Any] = made) -> Any:
            if made:
                raise failure
            made.append(batch)
            return compute(batch)

        monkeypatch.setattr(editor, "compute_edit", failing)
        with pytest.raises(type(failure)):
            editor.remove([requests[1].id])
        assert record(editor) == before
    monkeypatch.undo()
    editor.remove([requests[1].id])
    wanted = committed(cls, [requests[0]], [requests[2]])
    assert fingerprint(editor.model) == fingerprint(wanted.model)


def fit(editor: Any, requests: list[Any], **settings: Any) -> None:
    trainer = bare_trainer(max_epochs=1, inference_mode=False, **settings)
    trainer.fit(editor, EditDataModule(requests=requests, batch_size=2))


def test_a_checkpoint_holds_what_it_takes(cls: type[EditModule], tmp_path: Path) -> None:
    requests = tiny_requests(4)
    saving = ModelCheckpoint(tmp_path, "run", every_n_epochs=1)
    first = quick_editor(cls)
    fit(first, requests, callbacks=[saving], enable_checkpointing=True)
    resumed, trainer = quick_editor(cls), bare_trainer(inference_mode=False, limit_val_batches=None)
    data = EditDataModule(requests=requests)
    trainer.validate(resumed, data, ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert record(resumed) == record(first)
    for editor in (first, resumed):
        editor.remove([requests[1].id])
    assert record(resumed) == record(first)
    wanted = committed(cls, [requests[0]], requests[2:])
    assert fingerprint(resumed.model) == fingerprint(wanted.model)
    state = torch.load(tmp_path / "run.ckpt", weights_only=True)
    del state["optimizer_states"][0]["batches"]  # as it was written before
    for key in ("format_version", "sha256"):
        del state["lightning_edit"][key]
    torch.save(state, tmp_path / "old.ckpt")
    old = quick_editor(cls)
    trainer.validate(old, data, ckpt_path=tmp_path / "old.ckpt", verbose=False)
    before = fingerprint(old.model)
    if isinstance(first.delta, WeightDelta):
        with pytest.raises(EditError, match="from a checkpoint of an earlier version"):
            old.remove([requests[1].id])
        assert fingerprint(old.model) == before
    else:
        with pytest.warns(UserWarning, match="3 others stay as they were made"):
            old.remove([requests[1].id])
        assert [row["id"] for row in old.history] == list(old.target.request_ids)


def test_edits_of_which_nothing_is_known_are_not_made_again() -> None:
    one, two, three = tiny_requests(3)
    for make in (
        lambda editor: 2.0 * editor.edit(two),
        lambda editor: editor.edit(two) + editor.edit(three),
        lambda editor: WeightDelta(editor.edit(two).changes),
    ):
        editor = committed(ROME, [one])
        editor.commit(make(editor))
        before = record(editor)
        with pytest.raises(EditError, match=r"1 of the 2 parts.*scaled, added up or made by hand"):
            editor.remove([one.id])
        assert record(editor) == before


def test_under_mixed_precision_edits_are_made_again_in_it() -> None:
    requests = tiny_requests(4)
    for cls in (EDITORS["MEMIT"], EDITORS["WISE"]):
        editor, wanted = quick_editor(cls), quick_editor(cls)
        fit(editor, requests, precision="bf16-mixed")
        fit(wanted, requests[:2], precision="bf16-mixed")
        editor.remove([request.id for request in requests[2:]])
        assert fingerprint(editor.model) == fingerprint(wanted.model)
        if cls is EDITORS["MEMIT"]:  # the other computes all in float32
            exact = committed(cls, requests[:2])
            assert fingerprint(editor.model) != fingerprint(exact.model)


@pytest.mark.parametrize("name", [n for n, c in TRAINED.items() if n != "CaliNET"])
def test_what_was_trained_together_is_not_taken_apart(name: str) -> None:
    editor = quick_editor(TRAINED[name])
    fit(editor, tiny_requests(2))
    assert editor.committed().provenance.requests == tuple(r.fact() for r in tiny_requests(2))
    before = fingerprint(editor.model)
    with pytest.raises(EditError, match="trained on all requests together"):
        editor.remove([tiny_requests(1)[0].id])
    assert fingerprint(editor.model) == before


def test_an_editor_that_is_to_be_trained_has_nothing_to_take_out() -> None:
    for cls in HYPERNETWORKS.values():
        with pytest.raises(EditError, match="No request with the id 'a' is in the model"):
            quick_editor(cls).remove(["a"])


class Halting(EditModule):
    """Adds one to a matrix for each request, but for those that it fails on."""

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        failed = {r.id: "It is so." for r in batch.requests if r.target_new == "Dorin"}
        if len(failed) == len(batch):
            raise FailedRequestsError(failed)
        [name] = self.edited_names(self.tree)[:1]
        count = float(len(batch) - len(failed))
        edit = WeightDelta({name: torch.full_like(self.model.get_parameter(name), count)})
        edit.details["failed"] = failed
        return edit


@pytest.mark.filterwarnings("ignore:Nothing is written")
def test_what_failed_is_tried_again() -> None:
    one, two, three = tiny_requests(3)
    one = replace(one, target_new="Dorin", target_old=None)
    editor = Halting.from_model(tiny_model(), tiny_tokenizer())
    for batch in ([one, two], [three]):
        editor.commit(editor.edit(batch))
    assert list(editor.target.request_ids) == [two.id, three.id]
    with pytest.raises(EditError, match=f"No request with the id '{one.id}' is in the model"):
        editor.remove([one.id])
    editor.remove([two.id])
    assert list(editor.target.request_ids) == [three.id]
    assert [(row["id"], "failed" in row) for row in editor.history] == [
        (one.id, True),
        (three.id, False),
    ]
    [change] = [editor.delta.dense(name) for name in editor.delta.changes]
    assert torch.equal(change, torch.ones_like(change))


def test_measuring_leaves_the_record() -> None:
    one, *more = tiny_requests(3)
    editor = committed(ROME, [one])
    editor.test_protocol = "sequential"
    before = record(editor)
    trainer = bare_trainer(inference_mode=False)
    trainer.test(editor, EditDataModule(requests=more), verbose=False)
    assert record(editor) == before


def test_a_memory_keeps_no_text_of_what_it_forgot() -> None:
    one, two = tiny_requests(2)
    editor = committed(EDITORS["GRACE"], [one, two])
    editor.remove([one.id])
    assert [batch.ids for batch in editor.delta.batches if batch] == [{two.id}]
    kept = str(editor.edit_optimizer.state_dict())
    assert two.prompt in kept
    assert one.prompt not in kept
