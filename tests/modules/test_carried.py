# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a method carries from edit to edit advances with committed edits, and with nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from lightning_edit import EditBatch, EditCheckpoint, EditModule, WeightDelta
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer
from tests.modules.helpers import bare_trainer


class Counting(EditModule):
    """Adds the number of requests committed so far, this edit's included, to one matrix."""

    @override
    def default_layers(self, tree: Any) -> list[int]:
        return [0]

    @override
    def compute_edit(self, batch: EditBatch) -> WeightDelta:
        count = self.carried.get("count", torch.tensor(0)) + len(batch)
        [name] = self.edited_names(self.tree)
        edit = WeightDelta({name: torch.full_like(self.model.get_parameter(name), float(count))})
        edit.carried = {"count": count}
        return edit


def counting(**settings: Any) -> Counting:
    return Counting.from_model(tiny_model(), tiny_tokenizer(), **settings)


def data_of(n: int = 4) -> EditDataModule:
    return EditDataModule(requests=tiny_requests(n), batch_size=1, eval_batch_size=2)


def count_of(editor: EditModule) -> int:
    return int(editor.carried.get("count", torch.tensor(0)))


def test_an_edit_that_is_not_committed_changes_no_later_edit() -> None:
    editor = counting()
    for _ in range(2):
        edit = editor.edit(tiny_requests(2))
        with edit.applied(editor.model):
            pass
        assert int(edit.carried["count"]) == 2
    assert count_of(editor) == 0


def test_fit_carries_and_a_resumed_fit_carries_on(tmp_path: Path) -> None:
    def fit(folder: Path, ckpt_path: Path | None = None, **trainer: Any) -> Counting:
        editor = counting()
        made = bare_trainer(
            max_epochs=1,
            enable_checkpointing=True,
            callbacks=[EditCheckpoint(str(folder))],
            **trainer,
        )
        made.fit(editor, datamodule=data_of(), ckpt_path=ckpt_path)
        return editor

    whole = fit(tmp_path / "whole")
    assert count_of(whole) == 4
    fit(tmp_path / "parts", max_steps=3)
    resumed = fit(tmp_path / "parts", tmp_path / "parts" / "last.ckpt")
    assert count_of(resumed) == 4
    [name] = whole.delta.changes
    assert float(whole.delta.dense(name)[0, 0]) == 1 + 2 + 3 + 4
    assert torch.equal(resumed.delta.dense(name), whole.delta.dense(name))


def test_a_test_leaves_what_was_carried_as_it_was(monkeypatch: Any) -> None:
    for protocol, wanted in (("independent", [1, 1, 1, 1]), ("sequential", [1, 2, 3, 4])):
        editor = counting(test_protocol=protocol)
        seen: list[int] = []
        compute = editor.compute_edit

        def watched(batch: Any, compute: Any = compute, seen: Any = seen) -> WeightDelta:
            edit: WeightDelta = compute(batch)
            seen.append(int(edit.carried["count"]))
            return edit

        monkeypatch.setattr(editor, "compute_edit", watched)
        bare_trainer(inference_mode=False).test(editor, datamodule=data_of(), verbose=False)
        assert seen == wanted, protocol
        assert count_of(editor) == 0
