# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Edits are written into models and taken out again, to the bit, or refused."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_edit.artifacts import apply, export, revert
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError, ModelError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.demos import tiny_tokenizer
from lightning_edit.models import load_model, load_tokenizer
from tests import zoo
from tests.artifacts.helpers import made_run, same_weights, weights
from tests.runs import run_here


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", [*zoo.DECODERS, "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Only .* survives rounding")
def test_apply_then_revert_is_the_base(kind: str, dtype: torch.dtype) -> None:
    delta = made_run(kind, dtype)
    done = apply("run/delta")
    assert done.folder == Path("edited")
    base, edited = weights("base"), weights("edited")
    assert base.keys() == edited.keys()
    for name, tensor in edited.items():
        wanted = base[name]
        if name in delta.changes:
            wanted = (wanted.float() + delta.dense(name)).to(dtype)
            assert not torch.equal(tensor, base[name])
        assert torch.equal(tensor, wanted)
    undone = revert("run/delta")
    assert undone.folder == Path("restored")
    assert any("Every bit is that of the base" in note for note in undone.notes)
    assert same_weights(weights("restored"), base)
    assert weight_hash(load_model("restored", dtype="auto")) == delta.provenance.base.sha256
    tokenizer = load_tokenizer("restored")
    assert tokenizer("Velmora").input_ids == tiny_tokenizer()("Velmora").input_ids


def test_a_run_folder_will_do() -> None:
    delta = made_run()
    done = apply("run")
    assert done.what == "edited model"
    assert done.facts["base"] == "base"
    assert done.facts["requests"] == "1: capital-velmora"
    assert done.facts["changed"] == "2 parameters"
    assert done.facts["‖Δ‖"] == pytest.approx(delta.norm())
    assert done.notes == ("Undo with: lightning-edit revert run/delta --model edited",)
    card = Path("edited/README.md").read_text(encoding="utf-8")
    assert "capital-velmora" in card
    assert f"`{delta.provenance.base.sha256}`" in card


def test_narrower_weights_are_rounded_once() -> None:
    delta = made_run()
    done = apply("run", dtype="bfloat16")
    assert done.facts["dtype"] == "bfloat16"
    assert not any("Undo" in note for note in done.notes)
    base = weights("base")
    for name, tensor in weights("edited").items():
        wanted = base[name] + (delta.dense(name) if name in delta.changes else 0)
        assert torch.equal(tensor, wanted.bfloat16())
    with pytest.raises(ArtifactError, match="it is bfloat16, and the edit wrote float32"):
        revert("run")


@pytest.mark.filterwarnings("ignore:Only .* survives rounding")
def test_wider_weights_keep_the_whole_change() -> None:
    delta = made_run(dtype=torch.bfloat16)
    apply("run", dtype="float32")
    base = weights("base")
    for name, tensor in weights("edited").items():
        change = delta.dense(name) if name in delta.changes else torch.tensor(0.0)
        assert torch.equal(tensor, base[name].float() + change)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_another_base(dtype: Any) -> None:
    made_run()
    zoo.build("llama", seed=1).save_pretrained("other")
    with pytest.raises(ArtifactError, match="belongs to base with the weight hash"):
        apply("run", "other", dtype=dtype)
    assert not Path("edited").exists()
    apply("run", "other", dtype=dtype, check=False)
    other, edited = weights("other"), weights("edited")
    assert not same_weights(other, edited)
    assert edited.keys() == other.keys()


def test_another_base_in_wider_weights() -> None:
    made_run(dtype=torch.bfloat16)
    zoo.build("llama", seed=1).bfloat16().save_pretrained("other")
    with pytest.raises(ArtifactError, match="belongs to base with the weight hash"):
        apply("run", "other", dtype="float32")


@pytest.mark.parametrize("verb", [apply, export])
def test_the_base_has_moved(verb: Any) -> None:
    delta = made_run()
    base = dataclasses.replace(delta.provenance.base, id="./gone/base")
    delta.provenance = dataclasses.replace(delta.provenance, base=base)
    delta.save("delta")
    with pytest.raises(ModelError, match=r"base model as `./gone/base`.*name it with `model`"):
        verb("delta")
    verb("delta", model="base")


def test_the_base_is_not_recorded() -> None:
    model = zoo.build("llama")
    model.save_pretrained("base")
    WeightDelta({"model.norm.weight": torch.ones(32)}).save("delta")
    with pytest.raises(ArtifactError, match="does not record its base model"):
        apply("delta")
    done = apply("delta", "base")
    assert "The edit does not record its base's hash, so the base was not checked." in done.notes
    assert "The base has no tokenizer that could be copied." in done.notes
    assert torch.equal(weights("edited")["model.norm.weight"], model.model.norm.weight + 1)


def test_outputs_are_kept() -> None:
    made_run()
    apply("run")
    before = weights("edited")
    for verb in (apply, export):
        with pytest.raises(ArtifactError, match="is not empty"):
            verb("run", output="edited")
    with pytest.raises(ArtifactError, match="is not empty"):
        revert("run", output="base")
    with pytest.raises(ArtifactError, match="`base` in it is needed"):
        apply("run", output="base", force=True)
    with pytest.raises(ArtifactError, match="`edited` in it is needed"):
        revert("run", output="edited", force=True)
    with pytest.raises(ArtifactError, match="`run/delta` in it is needed"):
        apply("run", output="run", force=True)
    assert same_weights(weights("edited"), before)
    apply("run", output="edited", force=True, dtype="float16")
    assert load_model("edited", dtype="auto").dtype == torch.float16


def test_revert_without_originals() -> None:
    made_run(originals=False)
    done = apply("run")
    assert "saved without originals, so it cannot be undone exactly" in done.notes[0]
    with pytest.raises(ArtifactError, match="were not kept"):
        revert("run")
    many = WeightDelta({f"layers.{i}.weight": torch.ones(1) for i in range(39)})
    words = "The originals of layers.0.weight, .*, layers.4.weight and 34 more were not kept"
    with pytest.raises(ArtifactError, match=words):
        many.revert_(zoo.build("llama"))
    assert not Path("restored").exists()


def test_revert_what_was_not_applied() -> None:
    made_run()
    with pytest.raises(ArtifactError, match="the edit is not applied here"):
        revert("run", "base")


def test_two_edits_in_one_model() -> None:
    made_run(layers=(0,))
    second = made_run(folder="second", seed=1, layers=(2,))
    apply("run", output="one")
    done = apply("second", "one", "two", check=False)
    # It is the later edit that comes out alone, by the command that is said.
    [note] = done.notes
    words = shlex.split(note.partition("Undo with: lightning-edit ")[2])
    assert run_here([*words, "--output", "one-again"]) == 0
    assert same_weights(weights("one-again"), weights("one"))
    with pytest.raises(ArtifactError, match=r"another edit is in it too.*--no_check"):
        revert("run", "two", others=[])
    assert not Path("restored").exists()
    done = revert("run", "two", others=[], check=False)
    assert any("Other changes are left" in note for note in done.notes)
    wanted = weights("base")
    with torch.no_grad():
        for name in second.changes:
            wanted[name] += second.dense(name)
    assert same_weights(weights("restored"), wanted)


def test_revert_an_edit_that_records_no_hash() -> None:
    delta = made_run()
    plain = WeightDelta.load("run/delta")
    WeightDelta(plain.changes, originals=plain.originals).save("plain")
    apply("run")
    done = revert("plain")
    assert any("so the result was not checked" in note for note in done.notes)
    assert weight_hash(load_model("restored")) == delta.provenance.base.sha256


@pytest.mark.parametrize("verb", [apply, revert, export])
def test_no_such_edit(verb: Any) -> None:
    with pytest.raises(ArtifactError, match="`nowhere` holds no saved edit"):
        verb("nowhere")
