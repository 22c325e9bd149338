# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What is taken out of a memory leaves that of a run without it, whatever others made of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_edit import GRACE, WISE, EditDataModule, EditRequest, MemoryWrite, TPatcher
from lightning_edit.core.memory import memory_of
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.modules.memory_based.base import MemoryModule
from tests.modules.helpers import bare_trainer, fingerprint

ONE, TWO, THREE, FOUR = tiny_requests(4)
#: Another answer to the very prompt of the first, and its answer to another prompt nearby.
OTHER = replace(ONE, target_new=TWO.target_new, target_old=None, rephrases=(), id="other")
NEAR = EditRequest("The capital of Quillia is", "Quillia", ONE.target_new, id="near")

Batches = Sequence[Sequence[EditRequest]]


def committed(cls: type[MemoryModule], batches: Batches, **settings: Any) -> Any:
    """An editor that committed batches of requests."""
    editor = cls.from_model(*trained_tiny_model(), **{"layers": [2], "steps": 2, **settings})
    for batch in batches:
        editor.commit(editor.edit(batch))
    return editor


def without(batches: Batches, *ids: str) -> Batches:
    left = [[request for request in batch if request.id not in ids] for batch in batches]
    return [batch for batch in left if batch]


def check_removal(
    cls: type[MemoryModule], batches: Batches, *ids: str, **settings: Any
) -> tuple[Any, Any]:
    """Takes requests out, compares with a run without them, and gives both editors."""
    editor = committed(cls, batches, **settings)
    stood = fingerprint(editor.model)
    edit = editor.remove(ids)
    wanted = committed(cls, without(batches, *ids), **settings)
    assert fingerprint(editor.model) == fingerprint(wanted.model)
    assert editor.delta.batches == wanted.delta.batches
    edit.revert_(editor.model)
    assert fingerprint(editor.model) == stood != fingerprint(wanted.model)
    return editor, wanted


def placed(editor: Any) -> list[str]:
    return [row["placed"] for row in editor.history]


def test_keys_of_grace_are_as_if_the_other_had_never_been_near() -> None:
    settings = {"radius": 2.0, "steps": 1}
    batches: Batches = [[NEAR, ONE], [TWO]]
    # What joined the entry gets one of its own, which the split leaves another radius.
    for expansion in ("coverage", "moving_average"):
        editor, _ = check_removal(GRACE, batches, NEAR.id, expansion=expansion, **settings)
        assert placed(editor) == ["added", "split"]
    batches = [[TWO], [ONE], [OTHER], [THREE]]
    assert placed(committed(GRACE, batches, **settings)) == ["added", "split", "replaced", "split"]
    check_removal(GRACE, batches, ONE.id, TWO.id, **settings)


def test_what_took_the_place_of_another_gives_it_back() -> None:
    batches = [[ONE], [TWO], [OTHER], [THREE]]
    editor = committed(GRACE, batches, radius=1e-3)
    assert placed(editor) == ["added", "added", "replaced", "added"]
    assert ONE.id not in editor.memory.requests
    editor, wanted = check_removal(GRACE, batches, OTHER.id, radius=1e-3)
    assert list(wanted.memory.requests) == [ONE.id, TWO.id, THREE.id]
    # One whose place was taken can be taken out, too, and does not come back then.
    editor = committed(GRACE, batches, radius=1e-3)
    for gone in (ONE, OTHER):
        editor.remove([gone.id])
    wanted = committed(GRACE, [[TWO], [THREE]], radius=1e-3)
    assert fingerprint(editor.model) == fingerprint(wanted.model)


def test_copies_of_wise_are_filled_as_without_it() -> None:
    batches = [[ONE], [TWO, OTHER], [THREE], [FOUR, NEAR]]
    for settings in (
        {"copy_size": 2, "merged_copies": 2},
        {"copy_size": 2, "merged_copies": 1, "replay": True, "own_locality": True},
    ):
        check_removal(WISE, batches, TWO.id, steps=1, **settings)


def test_patches_are_learned_beside_those_that_stay() -> None:
    settings = {"lr": 0.1, "steps": 4, "first_check": 4, "memory_tokens": 64}
    editor, _ = check_removal(TPatcher, [[ONE, TWO], [THREE]], ONE.id, **settings)
    assert len(editor.memory) > 2


def test_a_request_that_was_changed_is_changed_again() -> None:
    changed = replace(ONE, target_new=THREE.target_new, target_old=None)
    check_removal(GRACE, [[ONE], [TWO], [changed, THREE]], TWO.id, steps=1)
    check_removal(WISE, [[ONE], [TWO], [changed, THREE]], ONE.id, steps=1)


def test_what_somebody_else_took_out_does_not_come_back(tmp_path: Path) -> None:
    requests = [ONE, TWO, THREE, FOUR]
    first = committed(WISE, [])
    trainer = bare_trainer(max_epochs=1, inference_mode=False)
    trainer.fit(first, EditDataModule(requests=requests, batch_size=2))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = committed(WISE, [])
    trainer.limit_val_batches = 0
    trainer.validate(
        resumed, EditDataModule(requests=requests), ckpt_path=tmp_path / "run.ckpt", verbose=False
    )
    wanted = committed(WISE, [[ONE], [FOUR]])
    for editor in (first, resumed):
        MemoryWrite.removing(editor.model, [TWO.id]).apply_(editor.model)
        assert TWO.prompt not in str(editor.edit_optimizer.state_dict())
        editor.remove([THREE.id])
        assert fingerprint(editor.model) == fingerprint(wanted.model)


def test_what_nobody_knows_the_making_of_stays_as_it_was_made() -> None:
    """Neither a memory that came with the model nor an edit that was applied by hand."""
    before = committed(WISE, [[ONE], [TWO]])
    later = WISE.from_model(before.model, before.tokens.tokenizer, layers=[2], steps=2)
    by_hand = committed(WISE, [[ONE]])
    by_hand.edit([TWO]).apply_(by_hand.model)
    for editor in (later, by_hand):
        editor.commit(editor.edit(THREE))
        assert editor.target.made_again([TWO.id]) is None
        entries = memory_of(editor.model).entries
        with pytest.warns(UserWarning, match=r"forgets 1 request\(s\), and 2 others stay as"):
            editor.remove([TWO.id])
        left = memory_of(editor.model).entries
        assert list(left) == [ONE.id, THREE.id]
        assert all(entry.equals(entries[name]) for name, entry in left.items())
        assert TWO.prompt not in str(editor.edit_optimizer.state_dict())
        with warnings.catch_warnings():  # where none is left there is nothing to make again
            warnings.simplefilter("error")
            editor.remove([ONE.id, THREE.id])
        assert not len(memory_of(editor.model))


def test_an_interrupt_leaves_keys_that_had_room_to_grow() -> None:
    """Rows are added in place; those of the memory that comes back must not be written over."""
    requests = [replace(ONE, prompt=f"{ONE.prompt} {i}", id=str(i)) for i in range(20)]
    editor = committed(GRACE, [[request] for request in requests], radius=1e-3, steps=1)
    before, compute, made = fingerprint(editor.model), editor.compute_edit, []

    def interrupted(batch: Any) -> Any:
        made.append(batch)
        if len(made) == 19:
            raise KeyboardInterrupt
        return compute(batch)

    editor.compute_edit = interrupted
    with pytest.raises(KeyboardInterrupt):
        editor.remove(["0"])
    assert fingerprint(editor.model) == before
    assert torch.equal(editor.memory.keys, editor.memory.rows("keys", editor.memory.entries))
    editor.compute_edit = compute
    editor.remove(["19"])
    wanted = committed(GRACE, [[request] for request in requests[:-1]], radius=1e-3, steps=1)
    assert fingerprint(editor.model) == fingerprint(wanted.model)
