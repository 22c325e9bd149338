# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Quantised weights are those of the formats' definitions, and edits are asked before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_edit import FineTune
from lightning_edit.__main__ import main
from lightning_edit.artifacts import survive
from lightning_edit.core.errors import ArtifactError, MissingDependencyError, ModelError
from lightning_edit.demos import tiny_requests, trained_tiny_model
from lightning_edit.evaluation import quantised as room
from lightning_edit.evaluation.quantised import quantised, rounded
from lightning_edit.evaluation.survival import measure_survival
from tests import zoo
from tests.modules.helpers import same, snapshot


def q4_0(weight: Tensor) -> Tensor:
    """As ggml-quants.c defines it: sixteen steps of a half, the largest entry at -8 of them."""
    blocks = weight.reshape(-1, 32)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    step = largest / -8
    inverse = torch.where(step == 0, 0, 1 / step)
    levels = (blocks * inverse + 8.5).floor().clamp(0, 15)
    return ((levels - 8) * step.half().float()).reshape(weight.shape)


def q8_0(weight: Tensor) -> Tensor:
    """As ggml-quants.c defines it: 127 steps of a half to either side."""
    blocks = weight.reshape(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / 127
    return ((blocks / step).round() * step.half().float()).reshape(weight.shape)


def int8(weight: Tensor) -> Tensor:
    """A scale for each output, symmetric."""
    step = weight.abs().amax(1, keepdim=True) / 127.5
    return (weight / step).round().clamp(-128, 127) * step


def int4(weight: Tensor) -> Tensor:
    """A scale for each 32 inputs, symmetric."""
    blocks = weight.reshape(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / 7.5
    return ((blocks / step).round().clamp(-8, 7) * step).reshape(weight.shape)


@pytest.mark.parametrize("reference", [q8_0, q4_0, int8, int4])
def test_weights_are_rounded_as_the_format_says(reference: Any) -> None:
    if reference in (int8, int4):
        pytest.importorskip("torchao")
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    read = rounded(weight, reference.__name__)
    # Where an entry lies between two steps, the last bit of a quotient decides.
    apart = (read - reference(weight)).abs() > 1e-5
    assert apart.float().mean() < 0.01
    assert float((read - weight).abs().max()) < 0.6
    assert not torch.equal(read, weight)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_all_linear_maps_of_the_blocks_are_rounded_and_put_back(kind: str) -> None:
    model = zoo.build(kind)
    kept = snapshot(model)
    maps = [m for m in model.modules() if isinstance(m, nn.Linear) or hasattr(m, "nf")]
    head = model.get_output_embeddings()
    with pytest.raises(KeyboardInterrupt), quantised(model, "q4_0"):  # noqa: PT012
        for one in maps:
            rows = one.weight if isinstance(one, nn.Linear) else one.weight.T
            name = next(n for n, p in model.named_parameters() if p is one.weight)
            before = kept[name] if isinstance(one, nn.Linear) else kept[name].T
            expected = before if one is head else q4_0(before.contiguous())
            assert (rows - expected).abs().gt(1e-5).float().mean() < 0.01, name
        raise KeyboardInterrupt
    assert same(model, kept)


def test_what_cannot_be_stored_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"`q4_0` shares a scale among 32 inputs.*the 40 of"):
        rounded(torch.zeros(2, 40), "q4_0")
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(MissingDependencyError, match=r"lightning-edit\[quantise\]"):
        rounded(torch.zeros(2, 40), "int8")


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FineTune:
    """An editor with an edit that takes, saved in ``edit``, of the model in ``base``."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = trained_tiny_model()
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    editor = FineTune.from_model(model, tokenizer, layers=[2], lr=5e-3, steps=50)
    editor.commit(editor.edit(tiny_requests(2)))
    editor.committed().save("edit")
    return editor


def test_edits_are_asked_before_and_after(
    saved: FineTune, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = survive("edit", "base", ["q8_0", "q4_0"])
    assert [(row.form, row.id) for row in found.rows] == [
        (form, request.id) for form in ("q8_0", "q4_0") for request in tiny_requests(2)
    ]
    for row in found.rows:
        with quantised(saved.model, row.form):  # type: ignore[arg-type]
            asked = saved.session.measured([r for r in tiny_requests(2) if r.id == row.id])
        assert row.after == pytest.approx(asked[row.id]["p_target"], abs=1e-5)
        assert row.before > 0.5
        assert row.outcome == ("held" if asked[row.id]["took"] else "lost")
    main(["survive", "edit", "--model", "base", "--formats", '["q8_0"]'])
    assert "q8_0: 2 of 2 edits that took are held, 0 lost." in capsys.readouterr().out
    monkeypatch.setattr(room, "rounded", lambda weight, _: torch.zeros_like(weight))
    assert {row.outcome for row in survive("edit", "base", ["q4_0"]).rows} == {"lost"}


def test_an_edit_that_never_took_is_not_lost() -> None:
    model, tokenizer = trained_tiny_model()
    editor = FineTune.from_model(model, tokenizer)
    [row] = measure_survival(model, editor.tokens, tiny_requests(1), ["q8_0"])
    assert row.outcome == "not taken"


def test_what_cannot_be_asked_is_refused(saved: FineTune) -> None:
    with pytest.raises(ArtifactError, match=r"`formats`: 'int2' is not known. Choose from int8"):
        survive("edit", "base", ["int2"])
    edit = saved.committed()
    edit.provenance = type(edit.provenance)(base=edit.provenance.base)
    edit.save("silent")
    with pytest.raises(ArtifactError, match="does not keep its requests in words"):
        survive("silent", "base", ["q8_0"])
