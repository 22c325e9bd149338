# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""RLEdit against edits that are written into the weights one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_edit import MALMEN, EditDataModule, EditRequest, RLEdit
from lightning_edit.core.processes import Processes
from lightning_edit.demos import tiny_requests, trained_tiny_model
from tests.modules.helpers import bare_trainer
from tests.modules.meta_learning.test_malmen import PlainMALMEN

# As MALMEN is, so that one can be compared with the other.
SETTINGS: dict[str, Any] = {
    "rank": 4,
    "blocks": 2,
    "edit_lr": 1e-2,
    "modules": ["mlp_out"],
    "micro_batch_size": 32,
    "locality_weight": 1.0,
}


def test_a_sequence_of_edits_is_each_on_top_of_those_before() -> None:
    settings = {**SETTINGS, "normalize": False}
    editor = RLEdit.from_model(
        *trained_tiny_model(), sequence=2, discount=0.5, shift_penalty=0.1, **settings
    )
    requests = tiny_requests(4)
    loss, figures = editor.edit_loss(requests, Processes())
    found = torch.autograd.grad(loss, list(editor.network.parameters()), allow_unused=True)

    def loss_of(asked: list[EditRequest], edits: list[Any]) -> float:
        """Losses of requests in a model with edits written into it."""
        plain = PlainMALMEN(MALMEN.from_model(*trained_tiny_model(), **settings))  # type: ignore[arg-type]
        weights = {
            site.name: site.parameter(plain.model).detach()
            + sum(edit.dense(site.name) for edit in edits)
            for site in plain.editor.sites
        }
        plain.shifts = lambda requests: {}  # type: ignore[method-assign]
        plain.patched = lambda deltas: weights  # type: ignore[method-assign]
        with torch.no_grad():
            return plain.loss(asked).item()

    written = MALMEN.from_model(*trained_tiny_model(), **settings)
    first = written.edit(requests[:2])
    first.apply_(written.model)
    second = written.edit(requests[2:])
    wanted = loss_of(requests[:2], [first])
    wanted += loss_of(requests[2:], [first, second])
    wanted += 0.5 * loss_of(requests[:2], [first, second])
    wanted += 0.1 * (first.norm() ** 2 + second.norm() ** 2)
    assert loss.item() == pytest.approx(wanted / 2, rel=1e-3)
    assert figures["loss"] == pytest.approx(wanted / 2, rel=1e-3)
    # The loss falls against the gradient.
    with torch.no_grad():
        for parameter, gradient in zip(editor.network.parameters(), found, strict=True):
            if gradient is not None:
                parameter.sub_(1e-6 * gradient / (gradient.norm() + 1e-12))
    later, _ = editor.edit_loss(requests, Processes())
    assert later.item() < loss.item()


def test_a_sequence_of_one_edit_is_trained_as_malmen_is() -> None:
    losses = []
    cases: list[tuple[Any, dict[str, Any]]] = [
        (MALMEN, {}),
        (RLEdit, {"sequence": 1, "shift_penalty": 0.0}),
    ]
    for cls, more in cases:
        editor = cls.from_model(*trained_tiny_model(), **{**SETTINGS, **more})
        loss, _ = editor.edit_loss(tiny_requests(3), Processes())
        gradients = torch.autograd.grad(loss, list(editor.network.parameters()))
        losses.append((loss.detach(), *gradients))
    for one, other in zip(*losses, strict=True):
        torch.testing.assert_close(one, other)


def test_how_far_back_requests_count_is_bounded() -> None:
    def loss_of(**more: Any) -> float:
        settings = {**SETTINGS, "sequence": 3, "shift_penalty": 0.0, **more}
        editor = RLEdit.from_model(*trained_tiny_model(), **settings)
        return float(editor.edit_loss(tiny_requests(3), Processes())[1]["loss"])

    assert loss_of(back_depth=1) == pytest.approx(loss_of(discount=0.0), rel=1e-6)
    assert loss_of(back_depth=2) < loss_of(back_depth=3)


def test_the_penalty_weighs_edits_as_the_losses_do() -> None:
    """Both are means over the sequence: twice the same edits cost what they cost once."""
    request = tiny_requests(1)[0]
    settings = {**SETTINGS, "normalize": False, "edit_weight": 0.0, "locality_weight": 0.0}
    found = []
    for n in (1, 2):
        editor = RLEdit.from_model(
            *trained_tiny_model(), **{**settings, "edit_lr": 1e-6}, sequence=n, shift_penalty=1e6
        )
        found.append(editor.edit_loss([request] * n, Processes())[0].item())
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_what_divides_a_batch_is_the_sequence() -> None:
    with pytest.raises(ValueError, match="RLEdit has no use for `edits_at_once`: `sequence`"):
        RLEdit(edits_at_once=2)
    assert RLEdit(edits_at_once=None).edits_at_once is None
    with pytest.raises(ValueError, match="`sequence` is expected to be at least 1"):
        RLEdit(sequence=0)


def test_training_on_sequences_lowers_their_loss() -> None:
    editor = RLEdit.from_model(
        *trained_tiny_model(), rank=16, blocks=2, lr=1e-3, edit_lr=0.05, edit_lr_lr=1e-3, sequence=4
    )
    requests = tiny_requests(8)
    before = editor.edit_loss(requests, Processes())[1]
    data = EditDataModule(requests=requests, batch_size=8)
    bare_trainer(max_epochs=12, gradient_clip_val=10.0).fit(editor, data)
    after = editor.edit_loss(requests, Processes())[1]
    assert after["loss"] < 0.7 * before["loss"]
    assert editor.skipped == 0
