# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A request's gradient does not depend on its company: passes, their order, other requests.

So it is for every editor that normalizes gradients, or has step sizes that were learned.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_edit import EditRequest, UltraEdit, WeightDelta
from lightning_edit.core.processes import Processes
from lightning_edit.data import EditDataModule
from lightning_edit.demos import tiny_requests
from lightning_edit.modules.meta_learning.factors import Factors, Gradients
from tests.contract.enumeration import EDITORS, HYPERNETWORKS, arguments_of, quick_editor
from tests.modules.helpers import bare_trainer

BY_PASSES = {
    name: cls
    for name, cls in {**EDITORS, **HYPERNETWORKS}.items()
    if "micro_batch_size" in arguments_of(cls)
}
# Answers of 1, 3, 2, 1, 1, 2 and 4 tokens, many of them of one length of prompt.
REQUESTS = tiny_requests(7)


def test_all_editors_by_passes_are_found() -> None:
    assert set(BY_PASSES) == {"UltraEdit", *HYPERNETWORKS}


@functools.cache
def editor_of(name: str) -> Any:
    """An editor that has learned, or has edited before."""
    editor = quick_editor(BY_PASSES[name])
    size = 1 if name == "KE" else 4
    bare_trainer(max_epochs=1).fit(
        editor, EditDataModule(requests=tiny_requests(12)[7:], batch_size=size)
    )
    return editor


def edit_of(editor: Any, requests: Sequence[EditRequest], size: int) -> WeightDelta:
    """The edit with passes of so many requests."""
    usual, editor.micro_batch_size = editor.micro_batch_size, size
    try:
        found: WeightDelta = editor.edit(list(requests))
    finally:
        editor.micro_batch_size = usual
    return found


def assert_same(one: WeightDelta, other: WeightDelta) -> None:
    assert one.changes.keys() == other.changes.keys()
    for name in other.changes:
        wanted = other.dense(name)
        difference = (one.dense(name) - wanted).norm() / wanted.norm()
        assert float(difference) < 2e-3, (name, float(difference))


@pytest.mark.parametrize("name", BY_PASSES)
def test_an_edit_is_the_same_for_all_passes_and_in_any_order(
    name: str, subtests: pytest.Subtests
) -> None:
    editor = editor_of(name)
    requests = REQUESTS[:1] if name == "KE" else REQUESTS
    wanted = edit_of(editor, requests, len(requests))
    for size in (1, 2, 5):
        with subtests.test(size=size):
            assert_same(edit_of(editor, requests, size), wanted)
    for order in (requests[::-1], [*requests[3:], *requests[:3]]):
        for size in (2, len(requests)):
            with subtests.test(order=[request.id for request in order], size=size):
                assert_same(edit_of(editor, order, size), wanted)


def gradients_of(
    editor: Any, requests: Sequence[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    """Inputs and gradients at the first projection, the rows of each request."""
    if isinstance(editor, UltraEdit):
        edit = editor.edit(list(requests))
        [site, *_] = editor.sites(editor.tree)
        details: Any = edit.details
        rows = torch.cat([details["keys"][site.name], details["gradients"][site.name]], 1)
        sizes = [
            len(editor.tokens.target(request.prompt, request.target_new)) for request in requests
        ]
    else:
        taken: list[Gradients] = []
        usual = editor.transform

        def transform(gradients: Gradients) -> dict[str, Factors]:
            taken.append(gradients)
            found: dict[str, Factors] = usual(gradients)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(editor, "transform", transform)
            editor.edit(list(requests))
        own = taken[0].rows[editor.sites[0].name]
        rows = torch.cat([own.inputs, own.gradients], 1)
        sizes = torch.bincount(own.requests, minlength=len(requests)).tolist()
    return list(torch.split(rows, sizes))


@pytest.mark.parametrize("name", sorted({*HYPERNETWORKS} - {"KE"}))
def test_a_gradient_is_the_same_alone_and_among_others(
    name: str, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    editor = editor_of(name)
    together = gradients_of(editor, REQUESTS, monkeypatch)
    for request, wanted in zip(REQUESTS, together, strict=True):
        with subtests.test(request=request.id):
            [alone] = gradients_of(editor, [request], monkeypatch)
            atol = 1e-4 * float(wanted.abs().max())
            torch.testing.assert_close(alone, wanted, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("name", sorted({*HYPERNETWORKS}))
def test_training_is_the_same_for_all_passes(name: str, subtests: pytest.Subtests) -> None:
    def trained(size: int) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        editor = quick_editor(HYPERNETWORKS[name], micro_batch_size=size)
        loss, _ = editor.edit_loss(REQUESTS, Processes())
        parameters = list(editor.network.parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found = [torch.zeros(()) if g is None else g for g in gradients]
        return loss.detach(), found, dict(editor.network.named_buffers())

    wanted = trained(len(REQUESTS))
    for size in (1, 2, 5):
        with subtests.test(size=size):
            loss, gradients, buffers = trained(size)
            torch.testing.assert_close(loss, wanted[0], rtol=1e-4, atol=1e-6)
            for one, other in zip(gradients, wanted[1], strict=True):
                atol = 1e-3 * float(other.abs().max()) + 1e-9
                torch.testing.assert_close(one, other, rtol=5e-3, atol=atol)
            for key, tensor in wanted[2].items():
                atol = 1e-4 * float(tensor.abs().max())
                torch.testing.assert_close(buffers[key], tensor, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("name", sorted({*HYPERNETWORKS} - {"KE"}))
def test_requests_add_up(name: str) -> None:
    """Of MALMEN and RLEdit, too, where the ridge is so large that keys do not tie them."""
    editor = editor_of(name)
    if name != "MEND":
        editor = quick_editor(HYPERNETWORKS[name], log_ridge=14.0)
        editor.edit_loss(REQUESTS[::-1], Processes())
    whole = editor.edit(REQUESTS)
    parts = [editor.edit(request) for request in REQUESTS]
    for key in whole.changes:
        wanted = torch.stack([part.dense(key) for part in parts]).sum(0)
        difference = (whole.dense(key) - wanted).norm() / wanted.norm()
        assert float(difference) < 2e-3, (key, float(difference))
