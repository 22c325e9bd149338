# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Saved edits that stand on one another are taken out in any order."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_edit.artifacts import apply, revert
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.models import load_model
from tests.artifacts.helpers import made_run, same_weights, weights

pytestmark = pytest.mark.filterwarnings("ignore:Only .* survives rounding")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stacked(dtype: torch.dtype = torch.float32) -> None:
    """Two edits of one base, partly of the same weights, both in ``two``; each alone in its own."""
    made_run(dtype=dtype, layers=(0, 2))
    made_run(dtype=dtype, folder="second", seed=1, layers=(1, 2))
    apply("run", output="run_alone")
    apply("second", output="second_alone")
    apply("run", output="one")
    apply("second", "one", "two", check=False)


def printed_undo(notes: tuple[str, ...]) -> dict[str, Any]:
    [line] = [note for note in notes if "Undo" in note]
    _, verb, delta, _, model, *more = shlex.split(line.partition(": ")[2])
    assert verb == "revert"
    return {"delta": delta, "model": model, "check": "--no_check" not in more}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_of_two_leaves_the_other_bit_for_bit(dtype: torch.dtype) -> None:
    stacked(dtype)
    base = weights("base")
    for first, second in itertools.permutations(("run", "second")):
        done = revert(first, "two", f"without_{first}")
        assert f"`{second}/delta`, bit for bit" in done.notes[0]
        assert same_weights(weights(f"without_{first}"), weights(f"{second}_alone"))
        done = revert(second, f"without_{first}", f"without_{first}_and_{second}")
        assert "Every bit is that of the base" in done.notes[0]
        assert same_weights(weights(f"without_{first}_and_{second}"), base)


def test_the_undo_that_is_printed_works() -> None:
    stacked()
    done = apply("second", "one", "again", check=False)
    revert(**printed_undo(done.notes), output="undone")
    assert same_weights(weights("undone"), weights("one"))
    # Of a model that was edited elsewhere, nothing is known.
    for name in ("lightning_edit.json", "README.md"):
        Path("one", name).unlink()
    done = apply("second", "one", "strange", check=False)
    assert any("up to rounding" in note for note in done.notes)
    done = revert(**printed_undo(done.notes), output="near")
    assert "exact up to rounding" in done.notes[0]
    for name, tensor in weights("one").items():
        torch.testing.assert_close(weights("near")[name], tensor, rtol=1e-5, atol=1e-5)


def test_an_edit_that_was_made_of_an_edited_model() -> None:
    first = made_run(layers=(0, 2))
    apply("run", output="one")
    second, model = made_run(folder="second", seed=1, layers=(0, 1)), load_model("one")
    base = weight_hash(model)
    made = WeightDelta(second.changes)
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    made.apply_(model)
    made = made.seal(model, originals)
    made.provenance = second.provenance.__class__(
        base=second.provenance.base.__class__("one", None, "float32", base)
    )
    made.save("second/delta")
    apply("second", output="two")
    done = revert("run", "two", "without_run")
    assert "bit for bit" in done.notes[0]
    wanted = weights("base")
    for name in made.changes:
        wanted[name] = torch.nn.Parameter(wanted[name].detach() + made.dense(name))
    assert same_weights(weights("without_run"), wanted)
    revert("second", "two", "without_second")
    assert same_weights(weights("without_second"), weights("one"))
    assert first.changes.keys() != made.changes.keys()


def test_the_middle_of_three() -> None:
    stacked()
    third = made_run(folder="third", seed=2, layers=(2,))
    apply("third", "two", "three", check=False)
    done = revert("second", "three")
    assert "rounded once" in done.notes[0]
    run, base, found = WeightDelta.load("run/delta"), weights("base"), weights("restored")
    for name, tensor in base.items():
        value = tensor
        for edit in (run, third):
            value = value + edit.dense(name) if name in edit.changes else value
        assert torch.equal(found[name], value)
    card = Path("restored/README.md").read_text("utf-8")
    assert "# base, edited" in card
    assert "for 2 request(s)" in card
    listed = json.loads(Path("restored/lightning_edit.json").read_text("utf-8"))["edits"]
    assert [edit["folder"] for edit in listed] == ["../run/delta", "../third/delta"]


def test_the_same_edit_twice_is_taken_out_once() -> None:
    made_run()
    apply("run", output="one")
    apply("run", "one", "two", check=False)
    revert("run", "two", "without")
    assert same_weights(weights("without"), weights("one"))


def test_others_that_are_not_known_are_asked_for() -> None:
    stacked()
    shutil.move("run", "elsewhere")
    with pytest.raises(ArtifactError, match="not the tensor that this edit wrote"):
        revert("second", "two")
    assert not Path("restored").exists()
    revert("second", "two", others=["elsewhere"])
    assert same_weights(weights("restored"), weights("run_alone"))
    made_run(folder="third", seed=2, layers=(2,))
    with pytest.raises(ArtifactError, match=r"yet another edit is in it.*--no_check"):
        revert("second", "two", "never", others=["third"])
    done = revert("second", "two", "near", others=[], check=False)
    assert "exact up to rounding. With their folders" in done.notes[0]
    for name, tensor in weights("run_alone").items():
        torch.testing.assert_close(weights("near")[name], tensor, rtol=1e-5, atol=1e-5)
    assert not Path("never").exists()


def test_an_edit_that_is_not_in_the_model_is_not_subtracted() -> None:
    stacked()
    with pytest.raises(ArtifactError, match="as it was before the edit"):
        revert("second", "base", others=[], check=False)
    assert not Path("restored").exists()


def test_what_else_was_written_is_told() -> None:
    stacked()
    model = load_model("two")
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    manifest = Path("two/lightning_edit.json").read_text("utf-8")
    model.save_pretrained("two")
    Path("two/lightning_edit.json").write_text(manifest, "utf-8")
    with pytest.raises(ArtifactError, match=r"another edit is in it too.*others"):
        revert("run", "two")
    done = revert("run", "two", check=False)
    assert "Other changes are left in the model" in done.notes[0]
